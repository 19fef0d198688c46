"""``frozen_probe``: logistic regression on the frozen embedding, the cheapest use of a foundation model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._base import Strategy, Trainer, check_tensors
from ._cells import CellData
from ._logistic import LogisticConfig, fit_logistic, softmax
from ._registry import register

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FrozenProbeConfig(LogisticConfig):
    """Settings of the probe: ``C``, ``class_weight`` and ``max_iter`` of the logistic regression.

    Parameters
    ----------
    C
        Inverse strength of the L2 penalty on standardised dimensions. None: the value among 0.001, 0.01, 0.1, 1 and
        10 with the best macro-F1 on the validation cells (then the lowest log loss there).
    class_weight
        None, or ``"balanced"``: training cells weigh one over the size of their class.
    max_iter
        Iterations of the solver (L-BFGS), at most.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "frozen_probe"


@register
class FrozenProbe(Strategy):
    """Multinomial logistic regression (scikit-learn) on the standardised ``<cls>`` embedding; the encoder stays frozen.

    A linear probe, Alain & Bengio 2017, https://arxiv.org/abs/1610.01644.

    Example
    -------
    >>> probe = FrozenProbe(FrozenProbeConfig(C=1.0))
    >>> probe.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8)
    >>> probe.predict_proba(query)
    """

    name = "frozen_probe"
    config_class = FrozenProbeConfig
    needs = frozenset({"embedding"})
    libraries = ("sklearn.linear_model", "sklearn.preprocessing")

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
        from sklearn.preprocessing import StandardScaler

        self._check_training_cells(train, val, n_classes)
        embedding, val_embedding = (np.asarray(cells.embedding, dtype=np.float64) for cells in (train, val))
        if not (np.isfinite(embedding).all() and np.isfinite(val_embedding).all()):
            raise ValueError("embedding has NaN or infinite values; check the checkpoint's weights.")
        scaler = StandardScaler().fit(embedding)
        fit = fit_logistic(
            scaler.transform(embedding),
            np.asarray(train.codes),
            scaler.transform(val_embedding),
            np.asarray(val.codes),
            n_classes=n_classes,
            config=self.config,
            name=self.name,
        )
        self._weights = {"mean": scaler.mean_, "scale": scaler.scale_, "coef": fit.coef, "intercept": fit.intercept}
        self._regularisation = fit.regularisation()
        self.n_classes, self.n_trainable, self.history = n_classes, fit.n_trainable, fit.history()

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``."""
        self._check_fitted()
        self._check_cells(cells)
        weights, embedding = self._weights, np.asarray(cells.embedding, dtype=np.float64)
        if embedding.shape[1] != len(weights["mean"]):
            raise ValueError(
                f"embedding has {embedding.shape[1]} dimensions, the probe expects {len(weights['mean'])}."
            )
        scaled = (embedding - weights["mean"]) / weights["scale"]
        return softmax(scaled @ weights["coef"].T + weights["intercept"]).astype(np.float32)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Mean and scale of the embedding, coefficients and intercepts, float64."""
        import torch

        self._check_fitted()
        return {name: torch.tensor(value) for name, value in self._weights.items()}

    def metadata(self) -> dict[str, Any]:
        """Also ``regularisation``: the C in use and the validation macro-F1 of all that were tried."""
        return {**super().metadata(), "regularisation": self._regularisation}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        self._load_metadata(metadata, "regularisation")
        n_classes, width = self.n_classes, len(state["mean"]) if "mean" in state else None
        check_tensors(
            self.name,
            state,
            {"mean": (width,), "scale": (width,), "coef": (n_classes, width), "intercept": (n_classes,)},
        )
        self._weights = {name: value.numpy().astype(np.float64) for name, value in state.items()}
        self._regularisation = dict(metadata["regularisation"])
