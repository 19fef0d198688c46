"""Whether a confidence of 0.8 is right in 80 of 100 cells."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from scdlkit._keys import DEFAULT_KEY
from scdlkit.get import predictions

from ._style import BLUE, GREY, LABEL_SIZE, companion_below, describe_cells, finish, of_strategy, start, tidy, title

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

_Z = 1.959964  # 97.5 % quantile of the normal distribution


def reliability(
    adata: AnnData,
    *,
    split: str | Sequence[str] | None = "test",
    label_key: str | None = None,
    n_bins: int = 10,
    key: str = DEFAULT_KEY,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | os.PathLike[str] | None = None,
) -> Axes | None:
    """Reliability diagram: accuracy against confidence, with the cells of each bin below.

    On the diagonal, confidence is the probability of being right; points below it are overconfident. Bars are 95 %
    Wilson intervals. ECE is the expected calibration error: the mean distance to the diagonal over cells. Cells
    without a confidence (unassigned) are left out.

    Parameters
    ----------
    adata
        AnnData with predictions of :func:`scdlkit.tl.adapt_annotation` or :func:`scdlkit.tl.predict`.
    split
        Which cells, see :func:`scdlkit.get.predictions`; the title says so unless they are test cells.
    label_key
        Column of ``.obs`` with the true labels; the learned one by default.
    n_bins
        Bins of equal width over confidence 0 to 1.
    key
        The result (``key_added``).
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
        If predictions or true labels are missing.
    ValueError
        If no labelled cell has a confidence.

    Notes
    -----
    Guo et al., On calibration of modern neural networks, ICML 2017.

    Example
    -------
    >>> sk.pl.reliability(adata)
    """
    from scdlkit.foundation.calibration import expected_calibration_error, reliability_table

    cells = predictions(adata, split=split, label_key=label_key, key=key)
    cells = cells[cells["confidence"].notna()]
    if cells.empty:
        raise ValueError(f"no labelled cell with split={split!r} has a confidence; all are unassigned.")
    correct = (cells["true"] == cells["predicted"]).to_numpy()
    confidence = cells["confidence"].to_numpy(dtype=float)
    bins = reliability_table(correct, confidence, n_bins=n_bins)
    error = expected_calibration_error(correct, confidence, n_bins=n_bins)
    filled = bins[bins["cells"] > 0]
    accuracy = filled["accuracy"].to_numpy(dtype=float)
    n = filled["cells"].to_numpy(dtype=float)

    ax, own = start(ax, (4.4, 5.0))
    lower = companion_below(ax, 0.28)
    tidy(ax)
    tidy(lower)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    low, high = _wilson(accuracy, n)
    ax.errorbar(
        filled["confidence"].to_numpy(dtype=float),
        accuracy,
        yerr=np.clip([accuracy - low, high - accuracy], 0, None),
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=1.4,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.tick_params(axis="x", labelbottom=False)
    ax.set_ylabel("accuracy", fontsize=LABEL_SIZE)
    left = bins["bin_left"].to_numpy(dtype=float)
    width = bins["bin_right"].to_numpy(dtype=float) - left
    lower.bar(left, bins["cells"], width=width, align="edge", color=BLUE, edgecolor="white", linewidth=0.8, alpha=0.7)
    lower.set_ylabel("cells", fontsize=LABEL_SIZE)
    lower.set_xlabel("confidence", fontsize=LABEL_SIZE)
    title(ax, f"Reliability{of_strategy(adata, key)}, ECE {error:.3f}", describe_cells(cells["split"]))
    return finish(ax, own=own, show=show, save=save)


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share of ``n`` (Wilson 1927), sound near 0 and 1 and for few cells."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
