"""Is one strategy really better than another? Paired differences with their intervals."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import differences, strategy_table

from ._style import (
    BLUE,
    GREY,
    INK,
    LABEL_SIZE,
    ORANGE,
    SMALL_SIZE,
    SPLIT_NAMES,
    describe_fits,
    finish,
    label_strategies,
    signed,
    start,
    tidy,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_ROW_HEIGHT = 0.34  # inches
_LEAST = 0.02  # macro-F1 that the axis reaches to both sides of 0


def strategy_differences(
    adata: AnnData,
    *,
    reference: Literal["baseline", "best"] = "baseline",
    split: Literal["val", "test"] = "test",
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Macro-F1 of every strategy minus that of the best baseline or of the best strategy, on the same cells.

    Bars are 95 % intervals of the paired difference. A filled point is one whose interval excludes 0, a hollow one may
    be chance. Strategies stand by rank.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    reference
        ``"baseline"``: the best baseline. ``"best"``: the best strategy.
    split
        ``"test"``, or ``"val"``, on which the choice rests.
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
        If ``reference`` or ``split`` is unknown, or the result has no such differences.

    Example
    -------
    >>> sk.pl.strategy_differences(adata)
    """
    if reference not in ("baseline", "best"):
        raise ValueError(f"reference must be 'baseline' or 'best', found {reference!r}.")
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', found {split!r}.")
    table = strategy_table(adata, key=key)
    found = differences(adata, key=key)
    found = found[(found["reference_role"] == reference) & (found["split"] == split)]
    if found.empty:
        missing = "no baseline finished" if reference == "baseline" else "the best has nothing to be compared with"
        raise ValueError(f"the result has no differences to the {reference} on {SPLIT_NAMES[split]} cells: {missing}.")
    against = str(found["reference"].iloc[0])
    found = found.set_index("strategy")
    table = table[table["strategy"].isin(found.index)]
    found = found.loc[table["strategy"]]
    values, low, high = (found[name].to_numpy(dtype=float) for name in ("difference", "low", "high"))
    sure = found["excludes_zero"].to_numpy(dtype=bool)
    rows = np.arange(len(found))

    ax, own = start(ax, (6.4, 1.35 + _ROW_HEIGHT * len(rows)))
    tidy(ax, grid="x")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    bounds = np.concatenate([values, low, high])
    reach = [min(float(np.nanmin(bounds)), -_LEAST), max(float(np.nanmax(bounds)), _LEAST)]
    pad = 0.06 * (reach[1] - reach[0])
    ax.set_xlim(reach[0] - pad, reach[1] + pad)
    ax.axvline(0, color=INK, linewidth=1, zorder=1)
    colors = [GREY if not s else BLUE if v > 0 else ORANGE for v, s in zip(values, sure, strict=True)]
    ax.hlines(rows, low, high, colors=colors, linewidth=1.8, zorder=2)
    faces = [color if s else "white" for color, s in zip(colors, sure, strict=True)]
    ax.scatter(values, rows, s=42, facecolors=faces, edgecolors=colors, linewidths=1.5, zorder=3)
    for row, value in enumerate(values):
        ax.annotate(
            signed(value),
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
    ax.set_xlabel(f"macro-F1 minus that of {against}, {SPLIT_NAMES[split]} cells", fontsize=LABEL_SIZE)
    what = "best baseline" if reference == "baseline" else "best strategy"
    detail = f"filled: interval excludes 0; {describe_fits(table, intervals=True)}"
    title(ax, f"Difference to the {what}, {against}", detail)
    return finish(ax, own=own, show=show, save=save)
