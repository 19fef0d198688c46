"""``celltypist``: the baseline of the field, CellTypist trained on the same cells. Needs the extra ``celltypist``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from scdlkit._optional import require_package
from scdlkit._settings import logger

from ._base import Strategy, Trainer, check_tensors
from ._cells import CellData
from ._config import Config, check_choice, check_number
from ._genes import LogNormalised, expression_of
from ._logistic import softmax
from ._registry import register
from ._scores import log_loss, macro_f1
from ._threads import few_threads

if TYPE_CHECKING:
    import torch

_HIGHEST = 10.0  # CellTypist cuts scaled values here
_BLOCK = 4096  # cells that are dense at once


@dataclass(frozen=True)
class CellTypistConfig(Config):
    """Settings of CellTypist, with its own defaults.

    Parameters
    ----------
    C
        Inverse strength of the L2 penalty of the logistic regression.
    use_SGD
        Train by stochastic gradient descent, for very many cells.
    alpha
        Strength of the L2 penalty of the stochastic gradient descent.
    max_iter
        Iterations, at most; by the number of cells by default.
    feature_selection
        Train twice: by stochastic gradient descent on all genes, and again on the ``top_genes`` with the largest
        coefficients of each class.
    top_genes
        Genes of each class; of no effect without ``feature_selection``.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "celltypist"

    C: float = 1.0
    use_SGD: bool = False
    alpha: float = 1e-4
    max_iter: int | None = None
    feature_selection: bool = False
    top_genes: int = 300

    def __post_init__(self) -> None:
        check_number("C", self.C, low=0, open_low=True)
        check_choice("use_SGD", self.use_SGD, (True, False))
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_number("max_iter", self.max_iter, low=1, integer=True, optional=True)
        check_choice("feature_selection", self.feature_selection, (True, False))
        check_number("top_genes", self.top_genes, low=1, integer=True)


@register
class CellTypist(Strategy):
    """CellTypist's logistic regression, each class against the rest, on all genes.

    Domínguez Conde et al. 2022, https://doi.org/10.1126/science.abl5197. Training is the package's own; what it learnt
    is kept as numbers, so that a saved model needs neither the package nor its pickles. Labels are those of the package;
    probabilities are a softmax of its scores, where the package has one sigmoid a class, which do not sum to 1. As in
    the package, genes that a query lacks are left out. Validation cells choose nothing.

    Example
    -------
    >>> baseline = CellTypist()
    >>> baseline.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8)
    """

    name = "celltypist"
    config_class = CellTypistConfig
    role = "baseline"
    needs = frozenset({"expression"})
    libraries = ("sklearn.linear_model",)
    package = "celltypist"

    def fit(
        self,
        train: CellData,
        val: CellData,
        *,
        n_classes: int,
        seed: int = 0,
        device: str = "cpu",
        trainer: Trainer | None = None,
    ) -> None:
        """See :meth:`Strategy.fit`; runs on the CPU, in an order of the cells drawn by ``seed``."""
        self._check_training_cells(train, val, n_classes)
        values = LogNormalised(train)
        matrix, names = values.matrix(), values.names  # of all genes: the package takes no pieces
        codes, config = np.asarray(train.codes), self.config
        package = _import_celltypist()
        with _quiet() as caught, _one_against_rest(), few_threads(matrix.shape[0] * matrix.shape[1]):
            model = package.train(
                matrix,
                labels=codes,
                genes=names,
                check_expression=False,  # a total of 10,000 over all genes, which a file with fewer does not have
                C=config.C,
                use_SGD=config.use_SGD,
                alpha=config.alpha,
                max_iter=config.max_iter,
                feature_selection=config.feature_selection,
                top_genes=config.top_genes,
                random_state=seed,
            )
        if any("ConvergenceWarning" in str(item.category) for item in caught):
            logger.warning("%s: stopped at the last iteration (max_iter=%s).", self.name, config.max_iter)
        coef, intercept = model.classifier.coef_, model.classifier.intercept_
        self.n_trainable = coef.size + intercept.size
        if len(coef) == 1:  # two classes share one row
            coef, intercept = np.vstack([-coef, coef]), np.concatenate([-intercept, intercept])
        self._weights = {
            "mean": np.asarray(model.scaler.mean_, dtype=np.float64),
            "scale": np.asarray(model.scaler.scale_, dtype=np.float64),
            "coef": np.asarray(coef, dtype=np.float64),
            "intercept": np.asarray(intercept, dtype=np.float64),
            "known": np.asarray(model.classifier.classes_, dtype=np.int64),
        }
        self._genes = np.asarray(model.classifier.features).astype(str).astype(object)
        self.n_classes = n_classes
        probabilities, val_probabilities = self._probabilities(train), self._probabilities(val)
        val_codes = np.asarray(val.codes)
        self.history = [
            {
                "epoch": 0,
                "train_loss": log_loss(codes, probabilities),
                "val_loss": log_loss(val_codes, val_probabilities),
                "val_macro_f1": macro_f1(val_codes, val_probabilities.argmax(1), n_classes),
            }
        ]

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``."""
        self._check_fitted()
        self._check_cells(cells)
        return self._probabilities(cells).astype(np.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Mean and scale of the genes, coefficients and intercepts (float64), codes of the classes they are of."""
        import torch

        self._check_fitted()
        return {name: torch.tensor(value) for name, value in self._weights.items()}

    def metadata(self) -> dict[str, Any]:
        """Also ``genes``, the names of the columns of ``coef``."""
        return {**super().metadata(), "genes": self._genes.tolist()}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`; the package is not needed."""
        self._load_metadata(metadata, "genes")
        n_genes, n_known = len(metadata["genes"]), len(state["known"]) if "known" in state else None
        check_tensors(
            self.name,
            state,
            {
                "mean": (n_genes,),
                "scale": (n_genes,),
                "coef": (n_known, n_genes),
                "intercept": (n_known,),
                "known": (n_known,),
            },
        )
        self._weights = {
            name: value.numpy().astype(np.int64 if name == "known" else np.float64) for name, value in state.items()
        }
        known = self._weights["known"]
        if len(np.unique(known)) < len(known) or known.min() < 0 or known.max() >= self.n_classes:
            raise ValueError(f"The saved class codes of strategy {self.name!r} do not fit {self.n_classes} classes.")
        self._genes = np.array(metadata["genes"], dtype=object)

    def _probabilities(self, cells: CellData) -> np.ndarray:
        """Float64 ``[n, n_classes]``; a class without training cells has probability 0."""
        weights = self._weights
        matrix, found = expression_of(cells, self._genes, self.name, absent="are left out")
        coef = np.where(found, weights["coef"], 0.0)
        probabilities = np.zeros((cells.n_cells, self.n_classes))
        for start in range(0, cells.n_cells, _BLOCK):
            rows = slice(start, start + _BLOCK)
            scaled = np.minimum((matrix[rows].toarray() - weights["mean"]) / weights["scale"], _HIGHEST)
            probabilities[rows, weights["known"]] = softmax(scaled @ coef.T + weights["intercept"])
        return probabilities


def _import_celltypist() -> Any:
    """The package, without what importing it changes: the root logger and the filters of warnings."""
    require_package("celltypist")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import celltypist
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return celltypist


@contextmanager
def _one_against_rest() -> Iterator[None]:
    """Let the package ask scikit-learn for ``multi_class="ovr"``, which scikit-learn 1.8 has removed."""
    from sklearn.linear_model import LogisticRegression

    if "multi_class" in signature(LogisticRegression).parameters:
        yield
        return

    class OneAgainstRest(LogisticRegression):
        def __init__(self, *, multi_class: str, **settings: Any) -> None:
            super().__init__(**settings)
            self.settings = settings

        def fit(self, X: np.ndarray, y: np.ndarray) -> OneAgainstRest:
            self.classes_ = np.unique(y)
            positive = self.classes_ if len(self.classes_) > 2 else self.classes_[1:]
            fits = [LogisticRegression(**self.settings).fit(X, y == label) for label in positive]
            self.coef_ = np.vstack([fit.coef_ for fit in fits])
            self.intercept_ = np.concatenate([fit.intercept_ for fit in fits])
            return self

    names = vars(sys.modules["celltypist.train"])
    original = names["LogisticRegression"]
    names["LogisticRegression"] = OneAgainstRest
    try:
        yield
    finally:
        names["LogisticRegression"] = original


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings in a list, and nothing of what the package logs on its way."""
    package = logging.getLogger("celltypist")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        package.setLevel(level)
