"""UMAP panels: coordinates, colours of many classes, and one legend for all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import PALE, PALETTE, SMALL_SIZE, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def umap_of(embedding: np.ndarray) -> np.ndarray:
    """Coordinates ``[cells, 2]``, the same for the same cells."""
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap's and scanpy's own, about threads and coming versions
        sc.pp.neighbors(cells, use_rep="X", n_neighbors=min(15, cells.n_obs - 1), random_state=0)
        sc.tl.umap(cells, random_state=0)
    return np.asarray(cells.obsm["X_umap"])


def class_colors(n: int) -> list[Any]:
    """Distinct colours: for all kinds of colour vision while there are enough, then ever longer palettes."""
    import matplotlib as mpl

    if n <= len(PALETTE):
        return list(PALETTE[:n])
    if n <= 20:
        tab = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
        return [*tab[::2], *tab[1::2]][:n]
    from scanpy.plotting import palettes

    long = palettes.default_28 if n <= 28 else palettes.default_102
    return [long[i % len(long)] for i in range(n)]


def draw_cells(ax: Axes, position: np.ndarray, codes: np.ndarray, colors: Sequence[Any]) -> None:
    """Cells by class; those with a negative code pale and below, the others in an order that favours no class."""
    size = float(np.clip(30_000 / len(position), 1.5, 18))
    rest = np.flatnonzero(codes < 0)
    ax.scatter(position[rest, 0], position[rest, 1], s=size, c=PALE, linewidths=0, rasterized=True)
    order = np.random.default_rng(0).permutation(np.flatnonzero(codes >= 0))
    shown = [colors[v] for v in codes[order]]
    ax.scatter(position[order, 0], position[order, 1], s=size, c=shown, linewidths=0, rasterized=True)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def legend_columns(n_classes: int, rows: int = 24) -> int:
    """Columns of the legend of so many classes."""
    return 1 + (n_classes - 1) // rows


def class_legend(figure: Figure, classes: Sequence[str], colors: Sequence[Any], *, n_columns: int, rest: str) -> None:
    """A legend right of all panels; ``rest`` names the pale cells, if there are any."""
    handles = [_dot(color, name) for color, name in zip(colors, shorten(classes), strict=True)]
    if rest:
        handles.append(_dot(PALE, rest))
    legend = figure.legend(
        handles=handles, loc="outside right center", ncols=n_columns, frameon=False, fontsize=SMALL_SIZE
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)


def _dot(color: Any, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", markersize=5, color=color, label=name)
