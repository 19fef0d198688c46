"""How good each strategy is with how many labels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_EFFICIENCY_KEY
from scdlkit.get import label_efficiency as efficiency_table

from ._style import (
    GREY,
    LABEL_SIZE,
    METRIC_NAMES,
    SMALL_SIZE,
    SPLIT_NAMES,
    describe_fits,
    finish,
    interval_of,
    padded,
    start,
    strategy_styles,
    tidy,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_BASELINE_DASHES = (0, (4, 2))


def label_efficiency(
    adata: AnnData,
    *,
    metric: str = "macro_f1",
    split: Literal["val", "test"] = "test",
    key: str = DEFAULT_EFFICIENCY_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Score of every strategy against the number of labelled cells it learned from.

    The bands are 95 % intervals, which there are of macro-F1; baselines are grey and dashed. All points are measured on
    the same test cells. Where a strategy failed, its line has a gap, and the legend says at which share.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.label_efficiency`.
    metric
        y axis, see :func:`strategy_comparison`.
    split
        ``"test"`` or ``"val"``, whose cells grow fewer with the labels.
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
        If ``metric`` or ``split`` is unknown, or every strategy failed at every share.

    Example
    -------
    >>> sk.tl.label_efficiency(adata, "cell_type")
    >>> sk.pl.label_efficiency(adata)
    """
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', found {split!r}.")
    table = efficiency_table(adata, key=key)
    known = [name for name in METRIC_NAMES if f"{split}_{name}" in table]
    if metric not in known:
        raise ValueError(f"metric must be one of {', '.join(map(repr, known))}, found {metric!r}.")
    column = f"{split}_{metric}"
    if not table[column].notna().any():
        raise ValueError(f"no strategy has {column} at any share of the labels; see the column 'error'.")
    low, high = interval_of(table, column)
    table = table.assign(low=low, high=high)
    styles = strategy_styles(table.drop_duplicates("strategy"))

    ax, own = start(ax, (6.6, 4.2))
    tidy(ax, grid="both")
    ax.set_xscale("log")
    # in the order of the scores with most labels, so that legend and lines agree
    last = table.sort_values("fraction").groupby("strategy")[column].last()
    order = sorted(styles, key=lambda name: (-np.nan_to_num(last[name], nan=-np.inf), name))
    for name in order:
        rows = table[table["strategy"] == name].sort_values("fraction")
        style, baseline = styles[name], styles[name].color == GREY
        x, y = rows["n_labelled"].to_numpy(dtype=float), rows[column].to_numpy(dtype=float)
        ax.fill_between(x, rows["low"], rows["high"], color=style.color, alpha=0.13, linewidth=0, zorder=1)
        ax.plot(
            x,
            y,
            label=name + _failures(rows),
            color=style.color,
            linestyle=_BASELINE_DASHES if baseline else "-",
            marker=style.marker,
            markersize=5,
            linewidth=1.6,
            zorder=2 if baseline else 3,
        )
    _x_ticks(ax, table)
    ax.set_ylim(*padded(np.concatenate([table[column], table["low"], table["high"]]), top=1.01))
    ax.set_xlabel("labelled cells (share of those there are)", fontsize=LABEL_SIZE)
    ax.set_ylabel(f"{METRIC_NAMES[metric]}, {SPLIT_NAMES[split]} cells", fontsize=LABEL_SIZE)
    with_bands = bool(np.isfinite(table["low"]).any())
    title(ax, "Quality by number of labels", describe_fits(table, intervals=with_bands).replace("bars", "bands"))
    legend = ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=SMALL_SIZE,
        borderaxespad=0,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return finish(ax, own=own, show=show, save=save)


def _failures(rows: pd.DataFrame) -> str:
    failed = rows["fraction"][rows["error"] != ""]
    return f"\n(failed at {', '.join(f'{100 * share:g} %' for share in failed)})" if len(failed) else ""


def _x_ticks(ax: Axes, table: pd.DataFrame) -> None:
    """Numbers of cells with their share below; of ticks that would touch the larger stays."""
    from matplotlib.ticker import NullLocator

    shares = table.groupby("fraction")["n_labelled"].mean().sort_index(ascending=False)
    spread = max(np.log(shares.iloc[0] / shares.iloc[-1]), 1e-9)
    kept: list[tuple[float, str]] = []
    for share, cells in shares.items():
        if not kept or np.log(kept[-1][0] / cells) > 0.09 * spread:
            kept.append((float(cells), f"{cells:,.0f}\n{100 * float(share):g} %"))  # type: ignore[arg-type]
    ax.set_xticks([cells for cells, _ in kept], labels=[text for _, text in kept])
    ax.xaxis.set_minor_locator(NullLocator())
