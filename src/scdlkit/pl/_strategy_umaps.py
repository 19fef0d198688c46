"""UMAP of every strategy's embedding, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from ._style import LABEL_SIZE, finish, title
from ._umap import class_colors, class_legend, draw_cells, legend_columns, umap_of

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from scdlkit.runner import AnnotationRunner

_MOST_COLUMNS = 4


def strategy_umaps(
    adata: AnnData,
    runner: AnnotationRunner,
    *,
    strategies: Sequence[str] | None = None,
    color: Literal["given", "predicted"] = "given",
    max_cells: int = 3000,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> list[Axes] | None:
    """UMAP (McInnes et al. 2018) of the cells as each strategy sees them, one panel a strategy.

    Strategies that leave the encoder frozen share one embedding, and one UMAP: with the given labels they stand in one
    panel. Cells are annotated anew under every strategy, and ``adata`` stays as it is.

    Parameters
    ----------
    adata
        Cells, those of the fit or others.
    runner
        Fitted :class:`scdlkit.AnnotationRunner`.
    strategies
        Which ones; by default all that are fitted and no baseline.
    color
        ``"given"``: the labels of ``adata``; cells without one are pale. ``"predicted"``: those of the strategy.
        Most cells may have been trained on; neither panel measures quality.
    max_cells
        Draw a random part of more cells than this.
    show
        Show the figure; False returns the axes.
    save
        Path to save the figure to.

    Returns
    -------
    list of Axes or None
        The panels, if ``show`` is False.

    Raises
    ------
    RuntimeError
        If the runner is not fitted.
    ValueError
        If a strategy is not fitted, ``color`` is unknown, or too few cells can be embedded.

    Example
    -------
    >>> runner = sk.tl.adapt_annotation(adata, "cell_type", strategies=("frozen_probe", "lora"))
    >>> sk.pl.strategy_umaps(adata, runner)
    """
    import matplotlib.pyplot as plt

    if color not in ("given", "predicted"):
        raise ValueError(f"color must be 'given' or 'predicted', found {color!r}.")
    fitted = runner.results_[runner.results_["error"] == ""]
    if strategies is None:
        strategies = list(fitted["strategy"][fitted["role"] == "strategy"])
    if not strategies:
        raise ValueError(f"strategies is empty; fitted are {', '.join(fitted['strategy'])}.")
    cells = adata
    if adata.n_obs > max_cells:
        cells = adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, max_cells, replace=False))].copy()
    found = {name: runner.predict(cells, strategy=name) for name in strategies}
    shown = np.flatnonzero(found[strategies[0]]["label_codes"] >= 0)
    if len(shown) < 3:
        raise ValueError(f"A UMAP needs at least 3 cells with a known gene, found {len(shown)}.")
    classes = [str(name) for name in runner.classes_]
    given = _given(cells, runner.label_key_, classes)[shown]

    latents: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    panels: list[tuple[list[str], np.ndarray, np.ndarray]] = []
    for name in strategies:
        latent = found[name]["latent"][shown]
        same = next((i for i, other in enumerate(latents) if np.allclose(latent, other, atol=1e-6)), None)
        if same is None:
            same = len(latents)
            latents.append(latent)
            positions.append(umap_of(latent))
        elif color == "given":
            next(names for names, position, _ in panels if position is positions[same]).append(name)
            continue
        panels.append(([name], positions[same], given if color == "given" else found[name]["label_codes"][shown]))

    colors, n_columns = class_colors(len(classes)), legend_columns(len(classes))
    across = min(len(panels), _MOST_COLUMNS)
    down = -(-len(panels) // across)
    size = (3.6 * across + 2.4 * n_columns, max(3.7 * down, 0.17 * min(len(classes), 25)))
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    axes = list(grid.ravel())
    for ax in axes[len(panels) :]:
        ax.remove()
    axes = axes[: len(panels)]
    for ax, (names, position, codes) in zip(axes, panels, strict=True):
        draw_cells(ax, position, codes, colors)
        title(ax, ", ".join(names))
    axes[0].set_xlabel("UMAP 1", loc="left", fontsize=LABEL_SIZE)
    axes[0].set_ylabel("UMAP 2", loc="bottom", fontsize=LABEL_SIZE)
    what = f"given labels ({runner.label_key_})" if color == "given" else "predicted labels"
    figure.suptitle(f"{len(shown):,} cells by {what}", x=0.01, ha="left", fontsize=LABEL_SIZE, parse_math=False)
    pale = any((codes < 0).any() for _, _, codes in panels)
    class_legend(figure, classes, colors, n_columns=n_columns, rest="no label" if pale else "")
    return axes if finish(axes[0], own=True, show=show, save=save) is not None else None


def _given(adata: AnnData, label_key: str, classes: list[str]) -> np.ndarray:
    """Codes of the labels of the cells, -1 without one or of another class."""
    if label_key not in adata.obs:
        raise ValueError(f"adata.obs has no {label_key!r}, the labels of the fit; pass color='predicted'.")
    code_of = {name: code for code, name in enumerate(classes)}
    return np.array([code_of.get(str(name), -1) for name in adata.obs[label_key]])
