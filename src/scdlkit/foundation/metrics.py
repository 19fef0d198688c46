"""How well labels were predicted, overall and per class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from .strategies._scores import confusion_counts, f1_from_counts

METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "weighted_f1", "mcc", "auroc_ovr")


def classification_metrics(
    true_codes: np.ndarray, probabilities: np.ndarray, classes: Sequence[str] | np.ndarray
) -> dict[str, float | str]:
    """Metrics of predicted probabilities; the predicted class is the most probable one.

    Parameters
    ----------
    true_codes
        int ``[n]``, positions in ``classes``.
    probabilities
        ``[n, classes]``.
    classes
        Names of the classes.

    Returns
    -------
    dict
        ``macro_f1``
            Mean F1 over the classes present among the true or the predicted labels, as scikit-learn's
            ``f1_score(average="macro")``.
        ``accuracy``
            Share of right cells.
        ``balanced_accuracy``
            Mean recall over the classes present among the true labels.
        ``weighted_f1``
            F1 of the classes weighted by their cells.
        ``mcc``
            Matthews correlation coefficient, 0 where it is not defined.
        ``auroc_ovr``
            Mean over all classes of the area under the ROC curve, class against rest (for two classes this is the
            usual area); NaN if a class has no cells or all cells.
        ``auroc_note``
            Why ``auroc_ovr`` is NaN, else empty.

    Raises
    ------
    ValueError
        If there are no cells, shapes disagree, a code is out of range, or a probability is not finite.

    Example
    -------
    >>> classification_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]), ["B", "T"])["macro_f1"]
    1.0
    """
    true_codes, probabilities, n_classes = np.asarray(true_codes), np.asarray(probabilities), len(classes)
    if probabilities.shape != (len(true_codes), n_classes):
        raise ValueError(
            f"probabilities must be cells x classes = {(len(true_codes), n_classes)}, found {probabilities.shape}."
        )
    _check_codes("true_codes", true_codes, n_classes)
    if not np.isfinite(probabilities).all():
        raise ValueError(f"probabilities has {(~np.isfinite(probabilities)).sum()} NaN or infinite values.")
    counts = confusion_counts(true_codes, probabilities.argmax(1), n_classes)
    support = counts.sum(1)
    right = np.diagonal(counts)
    f1 = f1_from_counts(counts)
    auroc, note = _auroc(true_codes, probabilities, [str(label) for label in classes])
    return {
        "macro_f1": float(np.nanmean(f1)),
        "accuracy": float(right.sum() / support.sum()),
        "balanced_accuracy": float((right[support > 0] / support[support > 0]).mean()),
        "weighted_f1": float((np.nan_to_num(f1) * support).sum() / support.sum()),
        "mcc": _matthews(counts),
        "auroc_ovr": auroc,
        "auroc_note": note,
    }


def per_class_metrics(
    true_codes: np.ndarray, predicted_codes: np.ndarray, classes: Sequence[str] | np.ndarray
) -> pd.DataFrame:
    """Precision, recall, F1 and true cells of each class.

    Parameters
    ----------
    true_codes, predicted_codes
        int ``[n]``, positions in ``classes``.
    classes
        Names of the classes.

    Returns
    -------
    DataFrame
        Columns class, precision, recall, f1, support; one row a class. Precision is NaN for a class that was never
        predicted, recall for one without cells, F1 for one with neither.

    Raises
    ------
    ValueError
        If there are no cells, lengths disagree or a code is out of range.

    Example
    -------
    >>> per_class_metrics(np.array([0, 1]), np.array([0, 0]), ["B", "T"])["f1"].tolist()
    [0.6666666666666666, 0.0]
    """
    true_codes, predicted_codes = np.asarray(true_codes), np.asarray(predicted_codes)
    if true_codes.shape != predicted_codes.shape:
        raise ValueError(f"true_codes has {true_codes.shape} cells, predicted_codes {predicted_codes.shape}.")
    _check_codes("true_codes", true_codes, len(classes))
    _check_codes("predicted_codes", predicted_codes, len(classes))
    counts = confusion_counts(true_codes, predicted_codes, len(classes))
    support, predicted, right = counts.sum(1), counts.sum(0), np.diagonal(counts)
    return pd.DataFrame(
        {
            "class": np.asarray(classes, dtype=object),
            "precision": np.divide(right, predicted, out=np.full(len(classes), np.nan), where=predicted > 0),
            "recall": np.divide(right, support, out=np.full(len(classes), np.nan), where=support > 0),
            "f1": f1_from_counts(counts),
            "support": support,
        }
    )


def _check_codes(name: str, codes: np.ndarray, n_classes: int) -> None:
    if len(codes) == 0:
        raise ValueError(f"{name} has no cells; metrics need at least one.")
    if codes.min() < 0 or codes.max() >= n_classes:
        raise ValueError(f"{name} must be in [0, {n_classes}), found {codes.min()} to {codes.max()}.")


def _matthews(counts: np.ndarray) -> float:
    """Multi-class Matthews correlation (Gorodkin 2004)."""
    wide = counts.astype(np.float64)
    true, predicted, n = wide.sum(1), wide.sum(0), wide.sum()
    spread = (n**2 - (true**2).sum()) * (n**2 - (predicted**2).sum())
    return float((np.trace(wide) * n - true @ predicted) / np.sqrt(spread)) if spread > 0 else 0.0


def _auroc(true_codes: np.ndarray, probabilities: np.ndarray, classes: list[str]) -> tuple[float, str]:
    support = np.bincount(true_codes, minlength=len(classes))
    if (support == len(true_codes)).any():
        return float("nan"), f"all cells are {classes[int(support.argmax())]}"
    if (support == 0).any():
        absent = [classes[code] for code in np.flatnonzero(support == 0)]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        return float("nan"), f"no cells of {', '.join(absent[:3])}{more}"
    areas = []
    for code, n_true in enumerate(support):
        ranks = rankdata(probabilities[:, code])  # the Mann-Whitney statistic, ties shared
        n_rest = len(true_codes) - n_true
        areas.append((ranks[true_codes == code].sum() - n_true * (n_true + 1) / 2) / (n_true * n_rest))
    return float(np.mean(areas)), ""
