"""The two numbers a fit is steered by: macro-F1 and log loss on held-out cells."""

from __future__ import annotations

import numpy as np

_SMALLEST = 1e-12  # keeps the log finite


def confusion_counts(true_codes: np.ndarray, predicted_codes: np.ndarray, n_classes: int) -> np.ndarray:
    """Cells by true class (rows) and predicted class (columns): int64 ``[n_classes, n_classes]``."""
    pairs = np.asarray(true_codes, dtype=np.int64) * n_classes + np.asarray(predicted_codes, dtype=np.int64)
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes)


def f1_scores(right: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 of each class from its numbers of right, true and predicted cells, all of one shape.

    NaN for a class that is neither among the true nor among the predicted labels; 0 for one that is never right.
    """
    either = np.asarray(true + predicted, dtype=np.float64)
    return np.divide(2.0 * right, either, out=np.full(either.shape, np.nan), where=either > 0)


def f1_from_counts(counts: np.ndarray) -> np.ndarray:
    """F1 of each class from :func:`confusion_counts`."""
    return f1_scores(np.diagonal(counts), counts.sum(1), counts.sum(0))


def macro_f1(true_codes: np.ndarray, predicted_codes: np.ndarray, n_classes: int) -> float:
    """Mean F1 over the classes present among the true or the predicted labels; NaN without cells."""
    f1 = f1_from_counts(confusion_counts(true_codes, predicted_codes, n_classes))
    return float(np.nanmean(f1)) if np.isfinite(f1).any() else float("nan")


def log_loss(true_codes: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log probability of the true class, in nats; NaN without cells."""
    if len(true_codes) == 0:
        return float("nan")
    chosen = probabilities[np.arange(len(true_codes)), true_codes].astype(np.float64)
    return float(-np.log(np.maximum(chosen, _SMALLEST)).mean())
