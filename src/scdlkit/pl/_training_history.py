"""Loss and validation score by epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import history, strategy_table

from ._style import LABEL_SIZE, SMALL_SIZE, companion_below, finish, start, strategy_styles, tidy, title

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_MOST_MARKERS = 30  # epochs with a marker each; longer histories are lines alone


def training_history(
    adata: AnnData,
    *,
    strategies: str | Sequence[str] | None = None,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Validation macro-F1 (top) and training loss (bottom) of every epoch.

    The ringed point is the epoch with the best validation macro-F1 (then loss), whose weights are kept. Strategies without epochs
    (such as ``frozen_probe``) have no line.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    strategies
        Which ones; all that have epochs by default.
    key
        Where the result is in ``.uns``.
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
    KeyError
        If the AnnData holds no such result.
    ValueError
        If no strategy (or one asked for) has epochs.

    Example
    -------
    >>> sk.pl.training_history(adata, strategies=["head", "lora"])
    """
    from matplotlib.ticker import MaxNLocator

    epochs = history(adata, key=key)
    epochs = epochs[epochs["epoch"] > 0]  # epoch 0: a fit without epochs
    table = strategy_table(adata, key=key)
    trained = [name for name in table["strategy"] if (epochs["strategy"] == name).any()]
    chosen = trained if strategies is None else [strategies] if isinstance(strategies, str) else list(strategies)
    missing = [name for name in chosen if name not in trained]
    if missing or not chosen:
        which = f"strategies {', '.join(map(repr, missing))} have" if missing else "no strategy here has"
        raise ValueError(f"{which} no training history; with epochs: {', '.join(trained) or 'none'}.")
    styles = strategy_styles(table)

    ax, own = start(ax, (6.4, 4.6))
    lower = companion_below(ax, 0.75)
    for name in chosen:
        rows = epochs[epochs["strategy"] == name].sort_values("epoch", kind="stable")
        x = rows["epoch"].to_numpy(dtype=float)
        score = rows["val_macro_f1"].to_numpy(dtype=float)
        style = styles[name]
        look = {
            "color": style.color,
            "linestyle": style.dashes,
            "marker": style.marker if len(x) <= _MOST_MARKERS else "",
            "markersize": 3.5,
            "linewidth": 1.5,
        }
        ax.plot(x, score, label=name, **look)
        lower.plot(x, rows["train_loss"].to_numpy(dtype=float), **look)
        if np.isfinite(score).any():
            # As in training: the highest score, of equal ones the lowest loss, of equal ones the first.
            best = np.lexsort((rows["val_loss"].to_numpy(dtype=float), -score))[0]
            ax.scatter(x[best], score[best], s=90, facecolors="none", edgecolors=style.color, linewidths=1.6, zorder=4)
    for axes in (ax, lower):
        tidy(axes, grid="y")
        axes.margins(x=0.02, y=0.08)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ax.tick_params(axis="x", labelbottom=False)
    ax.set_ylabel("validation macro-F1", fontsize=LABEL_SIZE)
    lower.set_ylabel("training loss", fontsize=LABEL_SIZE)
    lower.set_xlabel("epoch", fontsize=LABEL_SIZE)
    title(ax, "Training history (ringed: epoch kept)")
    _legend(ax)
    return finish(ax, own=own, show=show, save=save)


def _legend(ax: Axes) -> None:
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
