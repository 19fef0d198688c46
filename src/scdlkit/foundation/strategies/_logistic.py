"""Multinomial logistic regression whose strength of regularisation the validation cells choose.

``frozen_probe``, ``pca_logreg`` and ``logreg_genes`` share it, so that they differ in what they see of a cell and in nothing else.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scdlkit._settings import logger

from ._config import Config, check_choice, check_number
from ._scores import log_loss, macro_f1
from ._threads import few_threads

if TYPE_CHECKING:
    import scipy.sparse as sp
    from sklearn.linear_model import LogisticRegression

C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
_ABSENT = -1e4  # intercept of a class without training cells: its probability is exactly 0


@dataclass(frozen=True)
class LogisticConfig(Config):
    """Settings of the logistic regression.

    Parameters
    ----------
    C
        Inverse strength of the L2 penalty on standardised features. None: the value among 0.001, 0.01, 0.1, 1 and 10
        with the best macro-F1 on the validation cells (then the lowest log loss there).
    class_weight
        None, or ``"balanced"``: training cells weigh one over the size of their class.
    max_iter
        Iterations of the solver (L-BFGS), at most.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    C: float | None = None
    class_weight: Literal["balanced"] | None = None
    max_iter: int = 1000

    def __post_init__(self) -> None:
        check_number("C", self.C, low=0, open_low=True, optional=True)
        check_choice("class_weight", self.class_weight, (None, "balanced"))
        check_number("max_iter", self.max_iter, low=1, integer=True)


@dataclass
class LogisticFit:
    """A fitted logistic regression: ``softmax(features @ coef.T + intercept)``."""

    coef: np.ndarray  # float64 [classes, features]
    intercept: np.ndarray  # float64 [classes]
    C: float
    n_trainable: int
    scores: list[dict[str, float]] = field(default_factory=list)  # one row a value of C tried

    @property
    def best(self) -> dict[str, float]:
        """Scores at the chosen C."""
        return next(row for row in self.scores if row["C"] == self.C)

    def history(self) -> list[dict[str, float]]:
        """The one row of a fit without epochs."""
        return [{"epoch": 0, **{name: value for name, value in self.best.items() if name != "C"}}]

    def regularisation(self) -> dict[str, Any]:
        """How C was chosen, as plain values."""
        return {"C": self.C, "tried": [{name: row[name] for name in ("C", "val_macro_f1")} for row in self.scores]}


def fit_logistic(
    features: np.ndarray | sp.csr_matrix,
    codes: np.ndarray,
    val_features: np.ndarray | sp.csr_matrix,
    val_codes: np.ndarray,
    *,
    n_classes: int,
    config: LogisticConfig,
    name: str,
) -> LogisticFit:
    """Fit on the training cells, choose C by the validation cells.

    Parameters
    ----------
    features, val_features
        ``[cells, features]``, on a common scale, dense or CSR.
    codes, val_codes
        Label codes in ``[0, n_classes)``; a class may be absent and then never gets a probability above 0.
    n_classes, config, name
        Number of classes, settings, and the name to log under.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best: LogisticFit | None = None
    scores: list[dict[str, float]] = []
    for C in (config.C,) if config.C is not None else C_GRID:
        model = LogisticRegression(C=C, class_weight=config.class_weight, max_iter=config.max_iter)
        with warnings.catch_warnings(record=True) as caught, few_threads(features.size):
            warnings.simplefilter("always")
            model.fit(features, codes)
        if any(issubclass(item.category, ConvergenceWarning) for item in caught):
            logger.warning("%s: logistic regression with C=%g stopped at max_iter=%d.", name, C, config.max_iter)
        coef, intercept = _softmax_weights(model, n_classes)
        probabilities, val_probabilities = (softmax(x @ coef.T + intercept) for x in (features, val_features))
        scores.append(
            {
                "C": float(C),
                "train_loss": log_loss(codes, probabilities),
                "val_loss": log_loss(val_codes, val_probabilities),
                "val_macro_f1": macro_f1(val_codes, val_probabilities.argmax(1), n_classes),
            }
        )
        if best is None or _quality(scores[-1]) > _quality(best.best):
            n_trainable = model.coef_.size + model.intercept_.size
            best = LogisticFit(coef, intercept, float(C), n_trainable, scores)
    if best is None:
        raise RuntimeError("No value of C was tried.")
    logger.debug("%s: C=%g chosen by validation macro-F1 among %s.", name, best.C, [row["C"] for row in scores])
    return best


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities ``[n, classes]`` from logits."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _quality(row: dict[str, float]) -> tuple[float, float]:
    return row["val_macro_f1"], -row["val_loss"]


def _softmax_weights(model: LogisticRegression, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights for every class; two classes are one sigmoid in scikit-learn, which is a softmax against zeros."""
    coef, intercept = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(model.classes_) == 2:
        coef, intercept = np.vstack([np.zeros_like(coef), coef]), np.concatenate([np.zeros_like(intercept), intercept])
    all_coef, all_intercept = np.zeros((n_classes, coef.shape[1])), np.full(n_classes, _ABSENT)
    all_coef[model.classes_], all_intercept[model.classes_] = coef, intercept
    return all_coef, all_intercept
