"""``head``: scGPT's own annotation head on the frozen embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ._base import GradientStrategy, Trainer, check_tensors
from ._cells import CellData
from ._config import Config, TrainingConfig, check_choice, check_number
from ._registry import register
from ._threads import few_threads

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadConfig(Config):
    """Settings of the annotation head.

    Parameters
    ----------
    n_layers
        Linear layers, the last one included. scGPT: 3.
    standardise
        Centre and scale the dimensions of the embedding as they are in the training cells. Embeddings of all cells of
        a data set are much alike, and without it the head may learn nothing; False is what scGPT does.
    training
        How it is trained, see :class:`TrainingConfig`; for up to 100 epochs at a constant learning rate of 0.003 by
        default.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "head"

    n_layers: int = 3
    standardise: bool = True
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(learning_rate=3e-3, schedule="constant", warmup=0.0, max_epochs=100)
    )

    def __post_init__(self) -> None:
        check_number("n_layers", self.n_layers, low=1, integer=True)
        check_choice("standardise", self.standardise, (True, False))
        if not isinstance(self.training, TrainingConfig):
            raise ValueError(f"training must be a TrainingConfig, found {type(self.training).__name__}.")


@register
class Head(GradientStrategy):
    """(Linear, ReLU, LayerNorm) x (n_layers - 1) and a Linear to the classes, on the frozen ``<cls>`` embedding.

    The head of Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0, on a standardised embedding, which the
    first Linear could absorb: a better start, no other model.

    Example
    -------
    >>> head = Head(HeadConfig(training=TrainingConfig(class_weight="balanced")))
    >>> head.fit(cells.subset(split.train), cells.subset(split.val), n_classes=8, trainer=Trainer())
    """

    name = "head"
    config_class = HeadConfig
    needs = frozenset({"embedding"})
    libraries = ("sklearn.preprocessing", "torch")

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
        """See :meth:`Strategy.fit`."""
        with few_threads():
            super().fit(train, val, n_classes=n_classes, seed=seed, device=device, trainer=trainer)

    def build(self, train: CellData, *, n_classes: int, seed: int) -> None:
        """A fresh head, initialised by ``seed``."""
        import torch
        from sklearn.preprocessing import StandardScaler

        embedding = np.asarray(train.embedding)
        if not np.isfinite(embedding).all():
            raise ValueError("embedding has NaN or infinite values; check the checkpoint's weights.")
        self._mean, self._scale = np.zeros(embedding.shape[1]), np.ones(embedding.shape[1])
        if self.config.standardise:
            scaler = StandardScaler().fit(embedding.astype(np.float64))
            self._mean, self._scale = scaler.mean_, scaler.scale_
        self.module = self._empty_module(embedding.shape[1], n_classes)
        initialise_linears(self.module, torch.Generator().manual_seed(seed))

    def logits(self, cells: CellData) -> torch.Tensor:
        """Logits ``[n, n_classes]``."""
        import torch

        module = self.trained_module()
        embedding = np.asarray(cells.embedding)
        if embedding.shape[1] != len(self._mean):
            raise ValueError(f"embedding has {embedding.shape[1]} dimensions, the head expects {len(self._mean)}.")
        scaled = ((embedding - self._mean) / self._scale).astype(np.float32)
        return module(torch.from_numpy(scaled).to(next(module.parameters()).device))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights of the head (float32), mean and scale of the embedding (float64)."""
        import torch

        self._check_fitted()
        weights = {name: value.detach().cpu().clone() for name, value in self.trained_module().state_dict().items()}
        return {**weights, "mean": torch.tensor(self._mean), "scale": torch.tensor(self._scale)}

    def metadata(self) -> dict[str, Any]:
        """Also ``embsize``, the width of the embedding."""
        return {**super().metadata(), "embsize": len(self._mean)}

    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`; the head is on the CPU afterwards."""
        self._load_metadata(metadata, "embsize")
        width = int(metadata["embsize"])
        module = self._empty_module(width, self.n_classes)
        shapes: dict[str, tuple[int | None, ...]] = {n: tuple(value.shape) for n, value in module.state_dict().items()}
        check_tensors(self.name, state, {**shapes, "mean": (width,), "scale": (width,)})
        module.load_state_dict({name: state[name] for name in shapes})
        self._mean, self._scale = (state[name].numpy().astype(np.float64) for name in ("mean", "scale"))
        self.module = module.eval()

    def _empty_module(self, embsize: int, n_classes: int) -> torch.nn.Module:
        from scdlkit.foundation._random import seeded
        from scdlkit.foundation.model import AnnotationHead

        with seeded(0):  # nothing is drawn from the global generator, and what is drawn is replaced
            return AnnotationHead(embsize, n_classes, self.config.n_layers)


def initialise_linears(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Initialise Linear and LayerNorm layers as PyTorch does, by a local generator."""
    import torch

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(layer, torch.nn.LayerNorm):
                layer.weight.fill_(1.0)
                layer.bias.zero_()
