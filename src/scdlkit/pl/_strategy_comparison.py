"""Strategies side by side: validation and test score of each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import strategy_table
from scdlkit.get._result import find_param

from ._style import (
    BLUE,
    GREY,
    INK,
    LABEL_SIZE,
    ORANGE,
    PALE,
    SMALL_SIZE,
    check_metric,
    describe_fits,
    finish,
    interval_of,
    is_plain_baseline,
    label_strategies,
    legend_on_top,
    padded,
    start,
    tidy,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW_HEIGHT = 0.38  # inches
_APART = 0.15  # rows between a validation score and the test score below it, where they have intervals
_ERROR_WIDTH = 60


def strategy_comparison(
    adata: AnnData,
    *,
    metric: str = "macro_f1",
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Validation and test score of every strategy, best rank on top, baselines in grey.

    Bars are 95 % intervals, which there are of macro-F1; numbers are test scores. The dashed line is the test score of
    the best baseline without the foundation model, with its interval: a strategy left of it did worse on cells that
    neither has seen. Intervals of two strategies may overlap although they differ, as both are measured on the same
    cells; :func:`strategy_differences` shows that. The chosen strategy is in bold. Strategies that failed are listed
    last, with the reason.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    metric
        ``"macro_f1"``, ``"accuracy"``, ``"balanced_accuracy"``, ``"weighted_f1"``, ``"mcc"`` or ``"auroc_ovr"``. The
        order is always by rank, which rests on validation macro-F1.
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
        If ``metric`` is unknown.

    Example
    -------
    >>> sk.pl.strategy_comparison(adata, save="comparison.pdf")
    """
    table = strategy_table(adata, key=key)
    name = check_metric(table, metric)
    best = find_param(adata, "best_strategy", key)
    validation = table[f"val_{metric}"].to_numpy(dtype=float)
    test = table[f"test_{metric}"].to_numpy(dtype=float)
    intervals = {split: interval_of(table, f"{split}_{metric}") for split in ("val", "test")}
    all_bounds = np.concatenate([bound for pair in intervals.values() for bound in pair])
    with_bars = bool(np.isfinite(all_bounds).any())
    is_baseline = (table["role"] == "baseline").to_numpy()
    rows = np.arange(len(table))

    ax, own = start(ax, (6.6, 1.45 + (_ROW_HEIGHT + 0.06 * with_bars) * len(table)))
    tidy(ax, grid="x")
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(*padded(np.concatenate([validation, test, all_bounds]), top=1.01))  # no metric exceeds 1
    for row in rows[is_baseline]:
        ax.axhspan(row - 0.42, row + 0.42, facecolor="none", edgecolor=PALE, hatch="////", linewidth=0, zorder=0)
    colors = [GREY if baseline else BLUE for baseline in is_baseline]
    apart = _APART if with_bars else 0.0
    if with_bars:
        ax.hlines(rows - apart, *intervals["val"], colors=colors, linewidth=1.2, alpha=0.6, zorder=2)
        ax.hlines(rows + apart, *intervals["test"], colors=colors, linewidth=2, alpha=0.8, zorder=2)
    else:
        ax.hlines(rows, validation, test, colors=colors, linewidth=1.4, alpha=0.6, zorder=2)
    size = 34 if with_bars else 44
    ax.scatter(validation, rows - apart, s=size, facecolors="white", edgecolors=colors, linewidths=1.4, zorder=3)
    ax.scatter(test, rows + apart, s=size, facecolors=colors, edgecolors=colors, linewidths=1.4, zorder=4)
    with_line = _baseline_line(ax, table, validation, test, intervals["test"])
    _values(ax, table, test)

    ax.set_yticks(rows, labels=label_strategies(table), parse_math=False)
    ax.tick_params(axis="y", length=0)
    for tick, strategy, baseline in zip(ax.get_yticklabels(), table["strategy"], is_baseline, strict=True):
        tick.set_color(GREY if baseline else INK)
        tick.set_fontweight("bold" if strategy == best else "normal")
    ax.set_xlabel(name, fontsize=LABEL_SIZE)
    heading = "Strategies by rank on validation cells (bold: chosen)"
    title(ax, heading, describe_fits(table, intervals=with_bars), above_legend=True)
    _legend(ax, with_line)
    return finish(ax, own=own, show=show, save=save)


def _baseline_line(
    ax: Axes,
    table: pd.DataFrame,
    validation: np.ndarray,
    test: np.ndarray,
    interval: tuple[np.ndarray, np.ndarray],
) -> bool:
    """At the test score of the baseline that validation would choose; whether there is one."""
    usable = is_plain_baseline(table).to_numpy() & np.isfinite(validation) & np.isfinite(test)
    if not usable.any():
        return False
    chosen = np.flatnonzero(usable)[np.argmax(validation[usable])]
    ax.axvline(test[chosen], color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    low, high = interval[0][chosen], interval[1][chosen]
    if np.isfinite(low) and np.isfinite(high):
        ax.axvspan(low, high, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    return True


def _values(ax: Axes, table: pd.DataFrame, test: np.ndarray) -> None:
    """Test scores in a column right of the axes; the reason instead where a strategy failed."""
    for row, value in enumerate(test):
        if np.isfinite(value):
            ax.annotate(
                f"{value:.3f}",
                (1.0, row),
                xytext=(6, 0),
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=SMALL_SIZE,
                color=INK,
                annotation_clip=False,
            )
            continue
        error = " ".join(str(table["error"].iloc[row]).split()) if "error" in table else ""
        reason = f"failed: {error}" if error else "no test score"
        if len(reason) > _ERROR_WIDTH:
            reason = reason[: _ERROR_WIDTH - 1].rstrip() + "…"
        ax.annotate(
            reason,
            (0.0, row),
            xytext=(6, 0),
            xycoords=ax.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_SIZE,
            fontstyle="italic",
            color=ORANGE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            parse_math=False,
        )


def _legend(ax: Axes, with_line: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", linestyle="", markerfacecolor="white", markeredgecolor=BLUE, label="validation"),
        Line2D([], [], marker="o", linestyle="", color=BLUE, label="test (number)"),
    ]
    if with_line:
        handles.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="best baseline, test"))
    legend_on_top(ax, handles)
