"""Quality against cost, with the strategies that no other beats in both."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import strategy_table

from ._place_labels import place_labels
from ._style import (
    GREY,
    INK,
    LABEL_SIZE,
    PALE,
    SPLIT_NAMES,
    check_metric,
    describe_fits,
    finish,
    interval_of,
    start,
    strategy_styles,
    tidy,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_COSTS = {
    "n_trainable": "trainable parameters",
    "fit_seconds": "seconds to fit",
    "peak_memory_mb": "peak memory (MiB)",
}


def strategy_tradeoff(
    adata: AnnData,
    *,
    cost: str = "n_trainable",
    metric: str = "macro_f1",
    split: str = "val",
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Score of every strategy against what it costs.

    The line is the Pareto front: strategies for which no cheaper one is as good and no better one as cheap. They are
    filled, the others hollow; baselines are grey. Bars are 95 % intervals, which there are of macro-F1; the front goes by
    the scores alone. Strategies without a score (failed) are left out.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    cost
        x axis, logarithmic (0 has its own place at the left): ``"n_trainable"`` (parameters), ``"fit_seconds"`` or
        ``"peak_memory_mb"``.
    metric
        y axis, see :func:`strategy_comparison`.
    split
        Cells of the score: ``"val"``, on which a choice may rest, or ``"test"``.
    key
        Where the result is in ``.uns``.
    ax
        Axes to draw on; a new figure by default.
    show
        Show the figure; by default where it can be shown. False returns the axes.
    save
        Path to save to (``.png``, ``.pdf``, ``.svg``).

    Returns
    -------
    Axes or None
        The axes if ``show`` is False.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``cost``, ``metric`` or ``split`` is unknown, or no strategy has both a score and a cost.

    Example
    -------
    >>> sk.pl.strategy_tradeoff(adata, cost="fit_seconds")
    """
    if cost not in _COSTS:
        raise ValueError(f"cost must be one of {', '.join(map(repr, _COSTS))}, found {cost!r}.")
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', found {split!r}.")
    table = strategy_table(adata, key=key)
    name = check_metric(table, metric)
    styles = strategy_styles(table)
    costs = table[cost].to_numpy(dtype=float)
    scores = table[f"{split}_{metric}"].to_numpy(dtype=float)
    usable = np.isfinite(costs) & np.isfinite(scores)
    if not usable.any():
        raise ValueError(
            f"no strategy has both {split}_{metric} and {cost}; see sk.get.strategy_table(adata)['error']."
        )
    lows, highs = (bound[usable] for bound in interval_of(table, f"{split}_{metric}"))
    with_bars = bool(np.isfinite(lows).any())
    costs, scores, names = costs[usable], scores[usable], list(table["strategy"][usable])
    front = pareto_front(costs, scores)

    ax, own = start(ax, (6.0, 4.2))
    tidy(ax, grid="y")
    _scale(ax, costs)
    low, high = float(np.nanmin([*scores, *lows])), float(np.nanmax([*scores, *highs]))
    pad = max(0.14 * (high - low), 0.01)
    ax.set_ylim(low - pad, high + pad)
    steps = front[np.argsort(costs[front], kind="stable")]
    right = ax.get_xlim()[1]
    # A staircase: what a budget (x) can buy at best.
    line_x = np.append(np.repeat(costs[steps], 2)[1:], right)
    line_y = np.repeat(scores[steps], 2)
    ax.plot(line_x, line_y, color=PALE, linewidth=2, zorder=1, label="Pareto front")
    for index, strategy in enumerate(names):
        style = styles[strategy]
        ax.vlines(costs[index], lows[index], highs[index], color=style.color, linewidth=1, alpha=0.45, zorder=2)
        ax.scatter(
            costs[index],
            scores[index],
            s=52,
            marker=style.marker,
            facecolors=style.color if index in front else "white",
            edgecolors=style.color,
            linewidths=1.4,
            zorder=3,
        )
    ax.set_xlabel(_COSTS[cost], fontsize=LABEL_SIZE)
    ax.set_ylabel(f"{name}, {SPLIT_NAMES[split]} cells", fontsize=LABEL_SIZE)
    title(ax, "Quality against cost (filled: on the Pareto front)", describe_fits(table, intervals=with_bars))
    colors = [GREY if styles[strategy].color == GREY else INK for strategy in names]
    place_labels(ax, costs.tolist(), scores.tolist(), names, colors, (line_x.tolist(), line_y.tolist()))
    return finish(ax, own=own, show=show, save=save)


def pareto_front(costs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Positions that no other point beats: none is as cheap and as good, and better in one of both."""
    no_worse = (costs[None] <= costs[:, None]) & (scores[None] >= scores[:, None])
    better = (costs[None] < costs[:, None]) | (scores[None] > scores[:, None])
    return np.flatnonzero(~(no_worse & better).any(axis=1))


def _scale(ax: Axes, costs: np.ndarray) -> None:
    """Logarithmic from the smallest to the largest decade, with a place for 0 left of them."""
    from matplotlib.ticker import LogFormatterSciNotation, NullLocator

    positive = costs[costs > 0]
    if positive.size == 0:
        ax.set_xlim(-0.5, 0.5)
        ax.set_xticks([0])
        return
    first, last = np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max()))
    last = max(last, first + 1)
    decades = 10.0 ** np.arange(first, last + 1)
    has_zero = bool((costs <= 0).any())
    if not has_zero:
        ax.set_xscale("log")
        ax.set_xlim(decades[0] * 0.8, decades[-1] * 1.25)
        return
    ax.set_xscale("symlog", linthresh=decades[0], linscale=0.6)
    ax.set_xlim(-0.35 * decades[0], decades[-1] * 1.25)
    ax.xaxis.set_minor_locator(NullLocator())
    formatter = LogFormatterSciNotation()
    formatter.set_axis(ax.xaxis)
    ax.set_xticks(np.append(0.0, decades), labels=["0", *(formatter(value) for value in decades)])
