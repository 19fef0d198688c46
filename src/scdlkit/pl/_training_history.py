"""Loss and validation score by epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

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

    The ringed point is the epoch with the best validation macro-F1 (then loss), whose weights are kept. Of several fits
    (repeats, folds) each is a thin line with a small ring, and the thick line is their mean, as far as all of them
    go. Strategies without epochs (such as ``frozen_probe``) have no line.

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
    several = False
    for name in chosen:
        rows = epochs[epochs["strategy"] == name].sort_values("epoch", kind="stable")
        fits = [fit for _, fit in rows.groupby([c for c in ("repeat", "fold") if c in rows] or "strategy", sort=True)]
        several |= len(fits) > 1
        style = styles[name]
        for axes, column in ((ax, "val_macro_f1"), (lower, "train_loss")):
            if len(fits) > 1:
                for fit in fits:
                    axes.plot(fit["epoch"], fit[column], color=style.color, linewidth=0.6, alpha=0.4, zorder=1)
            x, mean = _mean(rows, column, len(fits))
            axes.plot(
                x,
                mean,
                label=name,
                color=style.color,
                linestyle=style.dashes,
                marker=style.marker if len(x) <= _MOST_MARKERS else "",
                markersize=3.5,
                linewidth=1.5 if len(fits) == 1 else 2,
                zorder=3,
            )
        best = np.array([_kept(fit) for fit in fits])
        size, width = (90, 1.6) if len(fits) == 1 else (22, 0.9)
        ax.scatter(
            best[:, 0], best[:, 1], s=size, facecolors="none", edgecolors=style.color, linewidths=width, zorder=4
        )
    for axes in (ax, lower):
        tidy(axes, grid="y")
        axes.margins(x=0.02, y=0.08)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ax.tick_params(axis="x", labelbottom=False)
    ax.set_ylabel("validation macro-F1", fontsize=LABEL_SIZE)
    lower.set_ylabel("training loss", fontsize=LABEL_SIZE)
    lower.set_xlabel("epoch", fontsize=LABEL_SIZE)
    title(ax, "Training history (ringed: epoch kept)", "thin: one fit; thick: mean of the fits" if several else "")
    _legend(ax)
    return finish(ax, own=own, show=show, save=save)


def _mean(rows: pd.DataFrame, column: str, n_fits: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs that all fits have, and the mean over the fits."""
    by_epoch = rows.groupby("epoch")[column].agg(["mean", "size"])
    by_epoch = by_epoch[by_epoch["size"] == n_fits]
    return by_epoch.index.to_numpy(dtype=float), by_epoch["mean"].to_numpy(dtype=float)


def _kept(fit: pd.DataFrame) -> tuple[float, float]:
    """Epoch and score that were kept, as in training: the highest score, of equal ones the lowest loss, then the first."""
    score = fit["val_macro_f1"].to_numpy(dtype=float)
    if not np.isfinite(score).any():
        return np.nan, np.nan
    best = np.lexsort((fit["val_loss"].to_numpy(dtype=float), -score))[0]
    return float(fit["epoch"].iloc[best]), float(score[best])


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
