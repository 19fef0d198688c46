"""How many genes a checkpoint knows, and how many of them a cell has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ._style import (
    BLUE,
    GREY,
    INK,
    LABEL_SIZE,
    ORANGE,
    PALE,
    PALETTE,
    SMALL_SIZE,
    companion_below,
    finish,
    legend_on_top,
    start,
    tidy,
)
from ._style import title as set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HOW_NAMES = {"symbol": "by symbol", "case": "by symbol, other case", "ensembl": "by Ensembl id"}
_HOW_COLORS = (BLUE, PALETTE[5], PALETTE[2], PALETTE[3], PALETTE[4])
_NEEDED = (
    "checkpoint",
    "n_genes",
    "n_matched",
    "overlap",
    "matched_how",
    "genes_per_cell",
    "max_length",
    "share_above_max_length",
)


def gene_overlap(
    report: Any,
    *,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Genes of the data that the checkpoint knows (top) and known genes per cell (bottom).

    Below, the box spans the quartiles and the whiskers the range over cells; the dashed line is ``max_length``, above
    which the model reads a random part of a cell's genes.

    Parameters
    ----------
    report
        What :func:`scdlkit.pp.inspect_annotation_data` returned.
    ax
        Axes to draw on, whose place is split in two; a new figure by default.
    show
        Show the figure; by default where it can be shown. False returns the axes.
    save
        Path to save to (``.png``, ``.pdf``, ``.svg``).

    Returns
    -------
    Axes or None
        The upper axes if ``show`` is False.

    Raises
    ------
    TypeError
        If ``report`` is not such a report.

    Example
    -------
    >>> report = sk.pp.inspect_annotation_data(adata, checkpoint="mini")
    >>> sk.pl.gene_overlap(report)
    """
    missing = [name for name in _NEEDED if not hasattr(report, name)]
    if missing:
        raise TypeError(
            f"report must come from sk.pp.inspect_annotation_data(adata), found {type(report).__name__} "
            f"without {', '.join(missing)}."
        )
    ax, own = start(ax, (6.6, 3.3))
    lower = companion_below(ax, 1.0, share_x=False)
    _draw_genes(ax, report)
    _draw_cells(lower, report)
    set_title(
        ax,
        f"{report.n_matched:,} of {report.n_genes:,} genes ({report.overlap:.1%}) known to {report.checkpoint!r}",
        above_legend=True,
    )
    return finish(ax, own=own, show=show, save=save)


def _draw_genes(ax: Axes, report: Any) -> None:
    parts = [(how, int(n)) for how, n in report.matched_how.items() if n]
    parts.sort(key=lambda part: list(_HOW_NAMES).index(part[0]) if part[0] in _HOW_NAMES else len(_HOW_NAMES))
    left, bars, unmatched = 0, [], report.n_genes - report.n_matched
    for index, (how, n) in enumerate(parts):
        name = f"{_HOW_NAMES.get(how, how)}: {n:,}"
        bars.append(ax.barh(0, n, left=left, height=0.5, color=_HOW_COLORS[index % len(_HOW_COLORS)], label=name))
        left += n
    unknown = ax.barh(
        0,
        unmatched,
        left=left,
        height=0.5,
        facecolor="white",
        edgecolor=GREY,
        hatch="////",
        linewidth=0.6,
        clip_on=False,
        label=f"unknown: {unmatched:,}",
    )
    bars.append(unknown)
    tidy(ax)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, max(report.n_genes, 1))
    ax.set_ylim(-0.32, 0.32)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("genes of the data", fontsize=LABEL_SIZE)
    legend_on_top(ax, bars)


def _draw_cells(ax: Axes, report: Any) -> None:
    quantiles = report.genes_per_cell
    low, q25, median, q75, high = (float(quantiles[name]) for name in ("min", "q25", "median", "q75", "max"))
    ax.hlines([0, 0], [low, q75], [q25, high], color=INK, linewidth=0.9)
    ax.vlines([low, high], -0.1, 0.1, color=INK, linewidth=0.9)
    ax.barh(0, q75 - q25, left=q25, height=0.4, facecolor=PALE, edgecolor=INK, linewidth=0.9)
    ax.vlines(median, -0.2, 0.2, color=INK, linewidth=1.8)
    ax.axvline(report.max_length, color=ORANGE, linestyle=(0, (4, 3)), linewidth=1.3)
    tidy(ax)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 1.05 * max(high, float(report.max_length)))
    ax.set_ylim(-0.32, 0.5)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("known genes per cell", fontsize=LABEL_SIZE)
    right = report.max_length > ax.get_xlim()[1] / 2
    ax.annotate(
        f"max_length {report.max_length:,}: {report.share_above_max_length:.1%} of cells do not fit",
        (report.max_length, 1.0),
        xycoords=ax.get_xaxis_transform(),
        xytext=(-5 if right else 5, -2),
        textcoords="offset points",
        ha="right" if right else "left",
        va="top",
        fontsize=SMALL_SIZE,
        color=ORANGE,
    )
