"""``pca_logreg``: the baseline without a foundation model, logistic regression on principal components of the genes."""

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
from ._threads import few_threads
from ._variable_genes import variable_genes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PCALogRegConfig(LogisticConfig):
    """Settings of the baseline.

    Parameters
    ----------
    C, class_weight, max_iter
        Of the logistic regression, as for ``frozen_probe``.
    n_top_genes
        Highly variable genes, at most.
    n_components
        Principal components, at most; fewer when there are fewer cells or genes.
    scale
        Divide genes by their standard deviation before the PCA; off, since it made rare types harder to tell apart in
        our trials.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "pca_logreg"

    n_top_genes: int = 2000
    n_components: int = 50
    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("n_top_genes", self.n_top_genes, low=1, integer=True)
        check_number("n_components", self.n_components, low=1, integer=True)
        if not isinstance(self.scale, bool):
            raise ValueError(f"scale must be True or False, found {self.scale!r}.")


@register
class PCALogReg(Strategy):
    """Log-normalise, highly variable genes (scanpy), PCA and multinomial logistic regression (scikit-learn).

    Genes and components come from the training cells alone. What a good linear model reaches on the genes is what a
    foundation model has to beat, Boiarsky et al. 2024, https://doi.org/10.1038/s42256-024-00949-w.
    Cells with other genes are aligned by name; absent genes count as not expressed.

    Example
    -------
    >>> baseline = PCALogReg(PCALogRegConfig(n_top_genes=1000))
    >>> baseline.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8)
    """

    name = "pca_logreg"
    config_class = PCALogRegConfig
    role = "baseline"
    needs = frozenset({"expression"})
    libraries = ("sklearn.decomposition", "sklearn.linear_model")

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
        """See :meth:`Strategy.fit`; runs on the CPU."""
        self._check_training_cells(train, val, n_classes)
        values = LogNormalised(train)
        chosen = variable_genes(values, self.config.n_top_genes)
        self._genes = values.names[chosen]
        matrix = values.matrix(lambda rows: rows[:, chosen])
        scale = standard_deviation(matrix) if self.config.scale else np.ones(len(chosen))
        mean, components = _principal_components(matrix.multiply(1 / scale).tocsr(), self.config.n_components, seed)
        # A component of the scaled genes, as weights of the unscaled ones: sparse cells stay sparse.
        self._weights = {"projection": components / scale, "offset": components @ mean}
        scores = self._project(matrix)
        spread = scores.std(0)
        self._weights["spread"] = np.where(spread > 0, spread, 1.0)
        fit = fit_logistic(
            scores / self._weights["spread"],
            np.asarray(train.codes),
            self._scores(val),
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
        return softmax(self._scores(cells) @ self._weights["coef"].T + self._weights["intercept"]).astype(np.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Projection to components, their spread, coefficients and intercepts, float64."""
        import torch

        self._check_fitted()
        return {name: torch.tensor(value) for name, value in self._weights.items()}

    def metadata(self) -> dict[str, Any]:
        """Also ``genes``, the names of the columns of ``projection``, and ``regularisation``."""
        return {**super().metadata(), "genes": self._genes.tolist(), "regularisation": self._regularisation}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        self._load_metadata(metadata, "genes", "regularisation")
        n_genes, n_components = len(metadata["genes"]), len(state["offset"]) if "offset" in state else None
        check_tensors(
            self.name,
            state,
            {
                "projection": (n_components, n_genes),
                "offset": (n_components,),
                "spread": (n_components,),
                "coef": (self.n_classes, n_components),
                "intercept": (self.n_classes,),
            },
        )
        self._weights = {name: value.numpy().astype(np.float64) for name, value in state.items()}
        self._genes = np.array(metadata["genes"], dtype=object)
        self._regularisation = dict(metadata["regularisation"])

    def _project(self, matrix: sp.csr_matrix) -> np.ndarray:
        return np.asarray(matrix @ self._weights["projection"].T) - self._weights["offset"]

    def _scores(self, cells: CellData) -> np.ndarray:
        return self._project(expression_of(cells, self._genes, self.name)[0]) / self._weights["spread"]


def _principal_components(matrix: sp.csr_matrix, n_components: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[genes]`` and components ``[components, genes]``, with no more components than the data has."""
    from sklearn.decomposition import PCA

    limit = min(matrix.shape)
    with few_threads(matrix.nnz):
        if n_components < limit:
            pca = PCA(n_components, svd_solver="arpack", random_state=seed).fit(matrix.astype(np.float64))
        else:
            pca = PCA(limit, svd_solver="full").fit(matrix.toarray().astype(np.float64))
    # n cells span n - 1 directions at most; a component beyond is rounding, which division by its spread would blow up
    kept = pca.singular_values_ > 1e-7 * pca.singular_values_[0]
    return pca.mean_, pca.components_[kept] if kept.any() else pca.components_[:1]
