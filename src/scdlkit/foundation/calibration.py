"""Is a confidence of 0.9 right nine times in ten?"""

from __future__ import annotations

import numpy as np
import pandas as pd


def reliability_table(correct: np.ndarray, confidence: np.ndarray, n_bins: int = 10) -> pd.DataFrame:
    """Accuracy of predictions by their confidence, in bins of equal width over [0, 1].

    Parameters
    ----------
    correct
        bool ``[n]``, whether the prediction was right.
    confidence
        ``[n]``, probability of the predicted class, in [0, 1].
    n_bins
        Number of bins. A bin holds its right edge, the first one also 0.

    Returns
    -------
    DataFrame
        Columns bin_left, bin_right, confidence and accuracy (means over the cells of the bin, NaN in an empty one),
        cells.

    Raises
    ------
    ValueError
        If lengths disagree, ``n_bins`` is below 1, or a confidence is outside [0, 1].

    Example
    -------
    >>> reliability_table(np.array([True, False]), np.array([0.9, 0.8]), n_bins=2)["accuracy"].tolist()
    [nan, 0.5]
    """
    correct, confidence = np.asarray(correct, dtype=bool), np.asarray(confidence, dtype=np.float64)
    if correct.shape != confidence.shape or correct.ndim != 1:
        raise ValueError(f"correct has shape {correct.shape}, confidence {confidence.shape}; both must be [cells].")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, found {n_bins}.")
    outside = ~((confidence >= 0) & (confidence <= 1 + 1e-6))  # NaN is outside, rounding above 1 is not
    if outside.any():
        raise ValueError(
            f"confidence must be in [0, 1]; {outside.sum()} values are not, first {confidence[outside][0]}."
        )
    edges = np.linspace(0, 1, n_bins + 1)
    bins = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)
    cells = np.bincount(bins, minlength=n_bins)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bins, weights=values, minlength=n_bins)
        return np.divide(sums, cells, out=np.full(n_bins, np.nan), where=cells > 0)

    return pd.DataFrame(
        {
            "bin_left": edges[:-1],
            "bin_right": edges[1:],
            "confidence": mean(confidence),
            "accuracy": mean(correct.astype(np.float64)),
            "cells": cells,
        }
    )


def expected_calibration_error(correct: np.ndarray, confidence: np.ndarray, n_bins: int = 10) -> float:
    """Mean distance between confidence and accuracy over the bins, weighted by cells (Guo et al. 2017).

    Parameters and errors as in :func:`reliability_table`; NaN without cells. Paper: https://arxiv.org/abs/1706.04599.

    Example
    -------
    >>> expected_calibration_error(np.array([True, True]), np.array([1.0, 0.5]))
    0.25
    """
    table = reliability_table(correct, confidence, n_bins)
    table = table[table["cells"] > 0]
    if table.empty:
        return float("nan")
    return float(np.average((table["confidence"] - table["accuracy"]).abs(), weights=table["cells"]))
