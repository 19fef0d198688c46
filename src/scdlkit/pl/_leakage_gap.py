"""How much better a random split makes a strategy look than a split by whole groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import leakage_gap as leakage_table
from scdlkit.get import strategy_table
from scdlkit.get._result import find_param

from ._style import (
    BLUE,
    GREY,
    INK,
    LABEL_SIZE,
    SMALL_SIZE,
    SPLIT_NAMES,
    finish,
    label_strategies,
    legend_on_top,
    padded,
    signed,
    start,
    tidy,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW_HEIGHT = 0.36  # inches


def leakage_gap(
    adata: AnnData,
    *,
    split: Literal["val", "test"] = "test",
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Macro-F1 under a split by whole groups beside that under a random split by cell, for every strategy.

    What the random split adds is what a strategy owes to cells of the same donor or batch in training; new donors will
    not have it. The numbers are this gap with its 95 % interval.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation` that was given a ``group_key``.
    split
        ``"test"`` or ``"val"``.
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
        If ``split`` is unknown, or the result has no leakage gap: it needs ``group_key``.

    Example
    -------
    >>> sk.tl.adapt_annotation(adata, "cell_type", group_key="donor")
    >>> sk.pl.leakage_gap(adata)
    """
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', found {split!r}.")
    table = strategy_table(adata, key=key)
    gaps = leakage_table(adata, key=key)
    gaps = gaps[gaps["split"] == split].set_index("strategy")
    table = table[table["strategy"].isin(gaps.index[gaps["gap"].notna()])]
    if table.empty:
        raise ValueError(
            f"the result has no leakage gap of {SPLIT_NAMES[split]} cells; it is measured with group_key= and "
            "leakage_gap=True."
        )
    gaps = gaps.loc[table["strategy"]]
    by_cell, by_group = (gaps[name].to_numpy(dtype=float) for name in ("by_cell", "by_group"))
    rows = np.arange(len(gaps))

    ax, own = start(ax, (6.4, 1.45 + _ROW_HEIGHT * len(rows)))
    tidy(ax, grid="x")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(*padded(np.concatenate([by_cell, by_group]), top=1.01))
    colors = [GREY if role == "baseline" else BLUE for role in table["role"]]
    ax.hlines(rows, by_group, by_cell, colors=colors, linewidth=1.6, alpha=0.6, zorder=2)
    ax.scatter(by_cell, rows, s=44, marker="D", facecolors="white", edgecolors=colors, linewidths=1.4, zorder=3)
    ax.scatter(by_group, rows, s=48, facecolors=colors, edgecolors=colors, zorder=4)
    for row, (gap, low, high) in enumerate(gaps[["gap", "low", "high"]].to_numpy(dtype=float)):
        interval = f"  [{signed(low, 2)}, {signed(high, 2)}]" if np.isfinite(low) and np.isfinite(high) else ""
        ax.annotate(
            f"{signed(gap)}{interval}",
            (1.0, row),
            xytext=(6, 0),
            xycoords=ax.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_SIZE,
            color=INK,
            annotation_clip=False,
        )
    ax.set_yticks(rows, labels=label_strategies(table), parse_math=False)
    ax.tick_params(axis="y", length=0)
    for tick, role in zip(ax.get_yticklabels(), table["role"], strict=True):
        tick.set_color(GREY if role == "baseline" else INK)
    ax.set_xlabel(f"macro-F1, {SPLIT_NAMES[split]} cells", fontsize=LABEL_SIZE)
    group_key = find_param(adata, "group_key", key)
    title(ax, f"What a split that ignores {group_key or 'groups'} adds (numbers)", above_legend=True)
    _legend(ax, group_key)
    return finish(ax, own=own, show=show, save=save)


def _legend(ax: Axes, group_key: str) -> None:
    from matplotlib.lines import Line2D

    whole = f"split by {group_key}" if group_key else "split by whole groups"
    handles = [
        Line2D([], [], marker="o", linestyle="", color=BLUE, label=f"{whole}: the honest score"),
        Line2D([], [], marker="D", linestyle="", markerfacecolor="white", markeredgecolor=BLUE, label="random split"),
    ]
    legend_on_top(ax, handles)
