"""``logreg_genes``: the baseline without a foundation model and without a reduction, logistic regression on genes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from ._base import Strategy, Trainer, check_tensors
from ._cells import CellData
from ._config import check_number
from ._genes import LogNormalised, expression_of, standard_deviation
from ._logistic import LogisticConfig, fit_logistic, softmax
from ._registry import register
from ._variable_genes import variable_genes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogRegGenesConfig(LogisticConfig):
    """Settings of the baseline.

    Parameters
    ----------
    C, class_weight, max_iter
        Of the logistic regression, as for ``frozen_probe``.
    n_top_genes
        Highly variable genes, at most.
    scale
        Divide genes by their standard deviation; off, as in ``pca_logreg``: in our trials it was no better, and worse
        for rare types.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "logreg_genes"

    n_top_genes: int = 2000
    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("n_top_genes", self.n_top_genes, low=1, integer=True)
        if not isinstance(self.scale, bool):
            raise ValueError(f"scale must be True or False, found {self.scale!r}.")


@register
class LogRegGenes(Strategy):
    """Log-normalise, highly variable genes (scanpy) and multinomial logistic regression (scikit-learn) on them.

    What Boiarsky et al. 2024, https://doi.org/10.1038/s42256-024-00949-w, found hard to beat. Values, genes and the
    search for C are those of ``pca_logreg``; only the components are missing. Genes are not centred, which the intercepts
    make up for, so the cells stay sparse. Time grows with the values that are not zero times the classes.

    Example
    -------
    >>> baseline = LogRegGenes(LogRegGenesConfig(n_top_genes=1000))
    >>> baseline.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8)
    """

    name = "logreg_genes"
    config_class = LogRegGenesConfig
    role = "baseline"
    needs = frozenset({"expression"})
    libraries = ("sklearn.linear_model",)

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
        """See :meth:`Strategy.fit`; runs on the CPU and uses no randomness."""
        self._check_training_cells(train, val, n_classes)
        values = LogNormalised(train)
        chosen = variable_genes(values, self.config.n_top_genes)
        self._genes = values.names[chosen]
        matrix = values.matrix(lambda rows: rows[:, chosen])
        self._weights = {"scale": standard_deviation(matrix) if self.config.scale else np.ones(len(chosen))}
        fit = fit_logistic(
            self._scaled(matrix),
            np.asarray(train.codes),
            self._scaled(expression_of(val, self._genes, self.name)[0]),
            np.asarray(val.codes),
            n_classes=n_classes,
            config=self.config,
            name=self.name,
        )
        self._weights |= {"coef": fit.coef, "intercept": fit.intercept}
        self._regularisation = fit.regularisation()
        self.n_classes, self.n_trainable, self.history = n_classes, fit.n_trainable, fit.history()

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``."""
        self._check_fitted()
        self._check_cells(cells)
        scaled = self._scaled(expression_of(cells, self._genes, self.name)[0])
        return softmax(scaled @ self._weights["coef"].T + self._weights["intercept"]).astype(np.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Scale of the genes, coefficients of the scaled genes and intercepts, float64."""
        import torch

        self._check_fitted()
        return {name: torch.tensor(value) for name, value in self._weights.items()}

    def metadata(self) -> dict[str, Any]:
        """Also ``genes``, the names of the columns of ``coef``, and ``regularisation``."""
        return {**super().metadata(), "genes": self._genes.tolist(), "regularisation": self._regularisation}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        self._load_metadata(metadata, "genes", "regularisation")
        n_genes, n_classes = len(metadata["genes"]), self.n_classes
        check_tensors(self.name, state, {"scale": (n_genes,), "coef": (n_classes, n_genes), "intercept": (n_classes,)})
        self._weights = {name: value.numpy().astype(np.float64) for name, value in state.items()}
        self._genes = np.array(metadata["genes"], dtype=object)
        self._regularisation = dict(metadata["regularisation"])

    def _scaled(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        return matrix.astype(np.float64).multiply(1 / self._weights["scale"]).tocsr()
