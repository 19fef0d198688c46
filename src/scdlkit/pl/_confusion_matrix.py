"""What each true class was called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scdlkit._keys import DEFAULT_KEY, UNASSIGNED
from scdlkit._settings import logger
from scdlkit.get import predictions
from scdlkit.get._predictions import prediction_classes

from ._style import GREY, LABEL_SIZE, PALE, SMALL_SIZE, describe_cells, finish, of_strategy, shorten, start, title

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes

_FEW_CLASSES = 12


def confusion_matrix(
    adata: AnnData,
    *,
    split: str | Sequence[str] | None = "test",
    label_key: str | None = None,
    order: Literal["hierarchical", "classes"] | Sequence[str] | None = None,
    counts: bool = False,
    annotate: bool | None = None,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Confusion matrix, each row divided by its cells.

    Colour is the share of a true class (row) that was called each class (column), so the diagonal is recall. Numbers
    of cells stand behind the row names. Classes without a cell have a hatched row. Cells that could not be assigned
    get a column of their own.

    Parameters
    ----------
    adata
        AnnData with predictions of :func:`scdlkit.tl.adapt_annotation` or :func:`scdlkit.tl.predict`.
    split
        Which cells, see :func:`scdlkit.get.predictions`. Only ``"test"`` (default) measures quality; the title says
        so of all others. None for all labelled cells.
    label_key
        Column of ``.obs`` with the true labels; the learned one by default.
    order
        ``"classes"``: as learned. ``"hierarchical"``: classes that are confused stand together. Or all classes in the
        order wanted. By default hierarchical from 13 classes on.
    counts
        Write numbers of cells instead of shares.
    annotate
        Write numbers into the cells; by default up to 12 classes, and wherever ``counts`` is true.
    key
        The result (``key_added``).
    ax
        Axes to draw on; a new figure, sized by the number of classes, by default.
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
        If predictions or true labels are missing.
    ValueError
        If ``split`` or ``order`` is unknown, or no labelled cell is left.

    Example
    -------
    >>> sk.pl.confusion_matrix(adata, counts=True)
    """
    cells = predictions(adata, split=split, label_key=label_key, key=key)
    classes = prediction_classes(adata, key=key)
    known = cells["true"].isin(classes)
    if not known.all():
        others = cells["true"][~known].value_counts()
        logger.info("%d cells of classes unknown to the model are not in the matrix: %s", others.sum(), dict(others))
        cells = cells[known]
        if cells.empty:
            raise ValueError(
                f"none of the true labels is a class of the model: {', '.join(map(str, others.index[:5]))}."
            )
    matrix = _count(cells, classes)
    shares = _row_shares(matrix)
    positions = _order(shares[:, : len(classes)], classes, order)
    columns = np.append(positions, len(classes)) if matrix[:, -1].any() else positions
    matrix, shares = matrix[np.ix_(positions, columns)], shares[np.ix_(positions, columns)]
    row_names = shorten([classes[position] for position in positions])
    column_names = row_names + [UNASSIGNED] * (len(columns) - len(positions))

    ax, own = start(ax, _figure_size(len(columns), max(map(len, row_names))))
    image = ax.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    _hatch_empty_rows(ax, matrix)
    if counts or annotate or (annotate is None and len(classes) <= _FEW_CLASSES):
        _annotate(ax, matrix, shares, counts)
    size = LABEL_SIZE if len(columns) <= 25 else SMALL_SIZE
    rows = [f"{name}  ({n:,})" for name, n in zip(row_names, matrix.sum(axis=1), strict=True)]
    ax.set_yticks(range(len(rows)), labels=rows, fontsize=size, parse_math=False)
    slant: dict[str, Any] = {"rotation": 90} if len(classes) > _FEW_CLASSES else {}
    if not slant and (len(columns) > 6 or max(map(len, column_names)) > 12):
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), labels=column_names, fontsize=size, parse_math=False, **slant)
    ax.tick_params(length=0)
    ax.spines[:].set_color(PALE)
    if len(classes) > _FEW_CLASSES:  # lines that lead the eye from a cell to its names
        ax.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
        ax.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
        ax.grid(which="minor", color=PALE, linewidth=0.35)
        ax.tick_params(which="minor", length=0)
    ax.set_xlabel("predicted", fontsize=LABEL_SIZE + 1)
    ax.set_ylabel("true (cells)", fontsize=LABEL_SIZE + 1)
    # As an inset the bar keeps to the matrix, whose shape is fixed, and takes no room from the axes of the caller.
    height = 1.0 if len(columns) <= 5 else 0.5
    bar_axes = ax.inset_axes((1.0 + 0.12 / len(columns) + 0.01, 1 - height, 0.015 + 0.1 / len(columns), height))
    bar = ax.figure.colorbar(image, cax=bar_axes)
    bar.set_label("share of the true class", fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=SMALL_SIZE)
    bar.outline.set_visible(False)
    title(ax, f"Confusion matrix{of_strategy(adata, key)}", describe_cells(cells["split"]))
    return finish(ax, own=own, show=show, save=save)


def _count(cells: pd.DataFrame, classes: list[str]) -> np.ndarray:
    """Cells of each true class (row) called each class, int ``[classes, classes + 1]``; last column: unassigned."""
    codes = {name: code for code, name in enumerate(classes)}
    n = len(classes)
    # A class of the user may be called "unassigned": what was not assigned is known by its missing confidence.
    columns = [
        n if np.isnan(sure) else codes.get(name, n)
        for name, sure in zip(cells["predicted"], cells["confidence"], strict=True)
    ]
    matrix = np.zeros((n, n + 1), dtype=np.int64)
    np.add.at(matrix, ([codes[name] for name in cells["true"]], columns), 1)
    return matrix


def _row_shares(matrix: np.ndarray) -> np.ndarray:
    """Rows divided by their sum; NaN where a row is empty."""
    totals = matrix.sum(axis=1, keepdims=True).astype(float)
    totals[totals == 0] = np.nan
    return matrix / totals


def _order(shares: np.ndarray, classes: list[str], order: str | Sequence[str] | None) -> np.ndarray:
    if order is None:
        order = "hierarchical" if len(classes) > _FEW_CLASSES else "classes"
    if isinstance(order, str):
        if order == "classes" or (order == "hierarchical" and len(classes) < 3):
            return np.arange(len(classes))
        if order != "hierarchical":
            raise ValueError(f"order must be 'hierarchical', 'classes' or a list of all classes, found {order!r}.")
        return _hierarchical(np.nan_to_num(shares))
    wanted = [str(name) for name in order]
    if sorted(wanted) != sorted(classes):
        wrong = sorted(set(wanted) ^ set(classes)) or ["some class twice"]
        raise ValueError(f"order must name each of the {len(classes)} classes once; check: {', '.join(wrong[:5])}.")
    return np.array([classes.index(name) for name in wanted])


def _hierarchical(shares: np.ndarray) -> np.ndarray:
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    likeness = (shares + shares.T) / 2
    distance = np.clip(1 - likeness, 0, None)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(condensed, method="average"), condensed))


def _figure_size(n: int, longest: int) -> tuple[float, float]:
    cell = 0.85 if n <= 5 else 0.55 if n <= _FEW_CLASSES else 0.3 if n <= 25 else 0.19  # inches
    names = 0.07 * longest
    return n * cell + names + 1.8, n * cell + names + 0.9


def _annotate(ax: Axes, matrix: np.ndarray, shares: np.ndarray, counts: bool) -> None:
    n = matrix.shape[1]
    size = 10 if n <= 5 else 8 if n <= _FEW_CLASSES else 6 if n <= 25 else 5
    for (row, column), cells in np.ndenumerate(matrix):
        if cells == 0:
            continue  # what did not happen stays blank, or the numbers that matter drown
        share = shares[row, column]
        text = f"{cells:,}" if counts else f"{share:.2f}"
        ax.text(
            column, row, text, ha="center", va="center", fontsize=size, color="white" if share > 0.55 else "#262626"
        )


def _hatch_empty_rows(ax: Axes, matrix: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for row in np.flatnonzero(matrix.sum(axis=1) == 0):
        ax.add_patch(
            Rectangle(
                (-0.5, row - 0.5),
                matrix.shape[1],
                1,
                facecolor="none",
                edgecolor=GREY,
                hatch="/////",
                linewidth=0,
                alpha=0.35,
            )
        )
