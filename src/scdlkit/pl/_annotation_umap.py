"""UMAP of the embedding: given labels beside predicted ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit._labels import column_of
from scdlkit.get._result import find_keys, find_result

from ._style import LABEL_SIZE, finish, title
from ._umap import class_colors, class_legend, draw_cells, legend_columns, umap_of

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
    position = umap_of(np.asarray(adata.obsm[keys.embedding])[shown])
    predicted = np.where(adata.obs[keys.split].to_numpy()[shown] == "train", -1, codes[shown])
    panels = [(f"predicted, {(predicted >= 0).sum():,} cells not trained on", predicted)]
    if label_key in adata.obs:
        code_of = {name: code for code, name in enumerate(classes)}
        given = np.array([code_of.get(str(name), -1) for name in column_of(adata, label_key).iloc[shown]])
        panels.insert(0, (f"given: {label_key}, {(given >= 0).sum():,} cells", given))

    colors, n_columns = class_colors(len(classes)), legend_columns(len(classes))
    width = 4.2 * len(panels) + 2.4 * n_columns
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.2), layout="constrained", squeeze=False)
    for ax, (text, values) in zip(axes[0], panels, strict=True):
        draw_cells(ax, position, values, colors)
        title(ax, text)
    axes[0][0].set_xlabel("UMAP 1", loc="left", fontsize=LABEL_SIZE)
    axes[0][0].set_ylabel("UMAP 2", loc="bottom", fontsize=LABEL_SIZE)
    pale = (predicted < 0).any() or (len(panels) > 1 and (panels[0][1] < 0).any())
    class_legend(figure, classes, colors, n_columns=n_columns, rest="trained on, or no label" if pale else "")
    return list(axes[0]) if finish(axes[0][0], own=True, show=show, save=save) is not None else None
