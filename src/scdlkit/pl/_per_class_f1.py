"""Which strategy is good at which class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import per_class_metrics, strategy_table

from ._style import (
    GREY,
    INK,
    LABEL_SIZE,
    PALE,
    SMALL_SIZE,
    SPLIT_NAMES,
    describe_fits,
    finish,
    label_strategies,
    shorten,
    signed,
    start,
    title,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_FEW_CLASSES = 15


def per_class_f1(
    adata: AnnData,
    *,
    split: Literal["val", "test"] = "test",
    metric: Literal["f1", "precision", "recall"] = "f1",
    relative_to: str | None = None,
    order: Literal["difficulty", "classes"] | Sequence[str] = "difficulty",
    annotate: bool | None = None,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """F1 of every class (rows) under every strategy (columns, by rank).

    Numbers of cells stand behind the class names, the mean of a fit where there are several. Classes without a cell in
    the split are hatched, strategies that failed are left out.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    split
        ``"test"`` or ``"val"``.
    metric
        ``"f1"``, ``"precision"`` or ``"recall"``.
    relative_to
        Name of a strategy or baseline: show the difference to it instead, purple where better, orange where worse.
    order
        Of the classes. ``"difficulty"``: highest mean over the strategies on top. ``"classes"``: as learned. Or all
        classes in the order wanted.
    annotate
        Write numbers into the cells; by default up to 15 classes.
    key
        Where the result is in ``.uns``.
    ax
        Axes to draw on; a new figure, sized by the numbers of classes and strategies, by default.
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
        If ``split``, ``metric``, ``relative_to`` or ``order`` is unknown, or there is no score of the split.

    Example
    -------
    >>> sk.pl.per_class_f1(adata, relative_to="pca_logreg")
    """
    if metric not in ("f1", "precision", "recall"):
        raise ValueError(f"metric must be 'f1', 'precision' or 'recall', found {metric!r}.")
    if split not in ("val", "test"):
        raise ValueError(f"split must be 'val' or 'test', found {split!r}.")
    scores = per_class_metrics(adata, split=split, key=key)
    if scores.empty:
        raise ValueError(f"the result has no per-class scores of the {SPLIT_NAMES[split]} cells.")
    table = strategy_table(adata, key=key)
    table = table[table["strategy"].isin(scores["strategy"])]
    names, classes = list(table["strategy"]), list(dict.fromkeys(scores["class"]))
    values = scores.pivot(index="class", columns="strategy", values=metric).loc[classes, names].to_numpy(dtype=float)
    support = scores.groupby("class")["support"].mean().loc[classes].to_numpy(dtype=float)
    values[support == 0] = np.nan  # no cell to be right about
    positions = _order(values, classes, order)
    if relative_to is not None:
        if relative_to not in names:
            raise ValueError(f"relative_to={relative_to!r} has no score here; with scores: {', '.join(names)}.")
        values = values - values[:, [names.index(relative_to)]]
    values, support = values[positions], support[positions]
    class_names = shorten([classes[position] for position in positions])

    ax, own = start(ax, _figure_size(len(classes), len(names), max(map(len, class_names))))
    if relative_to is None:
        limits, colormap = (0.0, 1.0), "Blues"
    else:
        largest = max(float(np.nanmax(np.abs(values), initial=0)), 0.05)
        limits, colormap = (-largest, largest), "PuOr"
    image = ax.imshow(
        np.ma.masked_invalid(values), cmap=colormap, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="none"
    )
    for row, column in np.argwhere(np.isnan(values)):
        _hatch(ax, row, column)
    if annotate or (annotate is None and len(classes) <= _FEW_CLASSES):
        _annotate(ax, image, values, difference=relative_to is not None, small=len(classes) > _FEW_CLASSES)
    _ticks(ax, table, class_names, support, relative_to)
    label = {"f1": "F1"}.get(metric, metric)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, aspect=14, shrink=min(1, 12 / len(classes)))
    bar.set_label(label if relative_to is None else f"{label} minus that of {relative_to}", fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=SMALL_SIZE)
    bar.outline.set_visible(False)
    detail = f"{SPLIT_NAMES[split]} cells" + (f"; {fits}" if (fits := describe_fits(table, intervals=False)) else "")
    title(ax, f"{label} of each class" if relative_to is None else f"{label} against {relative_to}", detail)
    return finish(ax, own=own, show=show, save=save)


def _order(values: np.ndarray, classes: list[str], order: str | Sequence[str]) -> np.ndarray:
    if isinstance(order, str):
        if order == "classes":
            return np.arange(len(classes))
        if order != "difficulty":
            raise ValueError(f"order must be 'difficulty', 'classes' or a list of all classes, found {order!r}.")
        means = pd.DataFrame(values).mean(axis=1).fillna(-1.0)
        return np.argsort(-means.to_numpy(), kind="stable")
    wanted = [str(name) for name in order]
    if sorted(wanted) != sorted(classes):
        wrong = sorted(set(wanted) ^ set(classes)) or ["some class twice"]
        raise ValueError(f"order must name each of the {len(classes)} classes once; check: {', '.join(wrong[:5])}.")
    return np.array([classes.index(name) for name in wanted])


def _figure_size(n_classes: int, n_strategies: int, longest: int) -> tuple[float, float]:
    row = 0.42 if n_classes <= 5 else 0.3 if n_classes <= _FEW_CLASSES else 0.2  # inches
    return 0.075 * (longest + 6) + 0.55 * n_strategies + 1.6, row * n_classes + 2.0


def _ticks(ax: Axes, table: pd.DataFrame, class_names: list[str], support: np.ndarray, relative_to: str | None) -> None:
    size = LABEL_SIZE if len(class_names) <= 25 else SMALL_SIZE
    rows = [f"{name}  ({n:,.0f})" for name, n in zip(class_names, support, strict=True)]
    ax.set_yticks(range(len(rows)), labels=rows, fontsize=size, parse_math=False)
    columns = label_strategies(table)
    ax.set_xticks(
        range(len(columns)), labels=columns, fontsize=LABEL_SIZE, parse_math=False, rotation=45, ha="right",
        rotation_mode="anchor",
    )  # fmt: skip
    for tick, name, role in zip(ax.get_xticklabels(), table["strategy"], table["role"], strict=True):
        tick.set_color(GREY if role == "baseline" else INK)
        tick.set_fontstyle("italic" if name == relative_to else "normal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.8)
    ax.tick_params(which="minor", length=0)


def _annotate(ax: Axes, image: object, values: np.ndarray, *, difference: bool, small: bool) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))  # type: ignore[attr-defined]
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = signed(value, 2) if difference else f"{value:.2f}"
        ax.text(
            column, row, text, ha="center", va="center", fontsize=6 if small else 7.5, color="white" if dark else INK
        )


def _hatch(ax: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(
        Rectangle(
            (column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor=PALE, hatch="/////", linewidth=0, zorder=2
        )
    )
