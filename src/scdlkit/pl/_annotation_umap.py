"""UMAP of the embedding: given labels beside predicted ones."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get._result import find_keys, find_result

from ._style import LABEL_SIZE, PALE, PALETTE, SMALL_SIZE, finish, shorten, title

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_MOST_CELLS = 20_000  # more add minutes and no picture


def annotation_umap(
    adata: AnnData,
    *,
    key: str = DEFAULT_KEY,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> list[Axes] | None:
    """UMAP of the embedding, coloured by the given labels and by the predictions for cells that were not trained on.

    Computes the UMAP (McInnes et al. 2018) anew from ``.obsm``, of at most 20,000 cells, and leaves ``adata`` as it is;
    to keep one, use ``scanpy.pp.neighbors(adata, use_rep="X_scgpt_best")`` and ``scanpy.tl.umap``.

    Parameters
    ----------
    adata
        Annotated cells.
    key
        ``key_added`` of the annotation.
    show
        Show the figure; False returns the axes.
    save
        Path to save the figure to.

    Returns
    -------
    list of Axes or None
        The two panels, if ``show`` is False.

    Raises
    ------
    KeyError
        If ``adata`` was not annotated, or its embedding is missing.

    Example
    -------
    >>> sk.pl.annotation_umap(adata)
    """
    import matplotlib.pyplot as plt

    result, keys = find_result(adata, key), find_keys(adata, key)
    label_key = result["params"]["label_key"]
    if missing := [name for name in (keys.label_code, keys.split) if name not in adata.obs]:
        raise KeyError(f"adata.obs has no {', '.join(missing)}; run sk.tl.adapt_annotation or sk.tl.predict first.")
    if keys.embedding not in adata.obsm:
        raise KeyError(f"adata.obsm has no {keys.embedding!r}; run sk.tl.adapt_annotation or sk.tl.predict first.")
    codes = adata.obs[keys.label_code].to_numpy()
    shown = np.flatnonzero(codes >= 0)
    if len(shown) < 3:
        raise ValueError(f"A UMAP needs at least 3 annotated cells, found {len(shown)}.")
    if len(shown) > _MOST_CELLS:
        shown = np.sort(np.random.default_rng(0).choice(shown, _MOST_CELLS, replace=False))
    classes = [str(name) for name in result["classes"]]
    position = _umap(np.asarray(adata.obsm[keys.embedding])[shown])
    predicted = np.where(adata.obs[keys.split].to_numpy()[shown] == "train", -1, codes[shown])
    panels = [(f"predicted, {(predicted >= 0).sum():,} cells not trained on", predicted)]
    if label_key in adata.obs:
        code_of = {name: code for code, name in enumerate(classes)}
        given = np.array([code_of.get(str(name), -1) for name in adata.obs[label_key].iloc[shown]])
        panels.insert(0, (f"given: {label_key}, {(given >= 0).sum():,} cells", given))

    colours = _colours(len(classes))
    n_columns = 1 + (len(classes) - 1) // 24
    width = 4.2 * len(panels) + 2.4 * n_columns
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.2), layout="constrained", squeeze=False)
    size = float(np.clip(30_000 / len(shown), 1.5, 18))
    for ax, (text, values) in zip(axes[0], panels, strict=True):
        # cells without a value below, the others in an order that favours no class
        rest = np.flatnonzero(values < 0)
        ax.scatter(*position[rest].T, s=size, c=PALE, linewidths=0, rasterized=True)
        order = np.random.default_rng(0).permutation(np.flatnonzero(values >= 0))
        ax.scatter(*position[order].T, s=size, c=[colours[v] for v in values[order]], linewidths=0, rasterized=True)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        title(ax, text)
    axes[0][0].set_xlabel("UMAP 1", loc="left", fontsize=LABEL_SIZE)
    axes[0][0].set_ylabel("UMAP 2", loc="bottom", fontsize=LABEL_SIZE)
    handles = [_dot(colour, name) for colour, name in zip(colours, shorten(classes), strict=True)]
    if (predicted < 0).any() or (len(panels) > 1 and (panels[0][1] < 0).any()):
        handles.append(_dot(PALE, "trained on, or no label"))
    legend = figure.legend(
        handles=handles, loc="outside right center", ncols=n_columns, frameon=False, fontsize=SMALL_SIZE
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return list(axes[0]) if finish(axes[0][0], own=True, show=show, save=save) is not None else None


def _umap(embedding: np.ndarray) -> np.ndarray:
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(embedding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap's and scanpy's own, about threads and coming versions
        sc.pp.neighbors(cells, use_rep="X", n_neighbors=min(15, cells.n_obs - 1), random_state=0)
        sc.tl.umap(cells, random_state=0)
    return np.asarray(cells.obsm["X_umap"])


def _colours(n: int) -> list[Any]:
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


def _dot(colour: Any, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=name)
