"""The one training loop: AdamW, early stopping on validation macro-F1, best epoch restored.

Randomness is the order of the cells alone and comes from a local generator, so a fit depends on the seed and on
nothing that ran before it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from scdlkit._settings import settings

from .strategies import CellData, GradientStrategy, TrainingConfig
from .strategies._scores import log_loss, macro_f1

if TYPE_CHECKING:
    import torch

__all__ = ["Trainer", "TrainingConfig", "class_weights"]

_EFFECTIVE_BETA = 0.999


class Trainer:
    """Trains any :class:`~scdlkit.foundation.strategies.GradientStrategy` as its ``config.training`` says.

    Parameters
    ----------
    progress
        Show a progress bar with loss and validation macro-F1; the setting by default.

    Example
    -------
    >>> head = Head()
    >>> head.fit(train, val, n_classes=8, seed=42, trainer=Trainer())
    >>> head.history[0]
    {'epoch': 1, 'train_loss': 1.21, 'val_loss': 0.63, 'val_macro_f1': 0.71}
    """

    def __init__(self, *, progress: bool | None = None) -> None:
        self.progress = progress

    def warm_up(self) -> None:
        """Take one step on nothing, so that what PyTorch loads for its first step is not taken for training time."""
        import torch

        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()

    def train(
        self, strategy: GradientStrategy, train: CellData, val: CellData, *, n_classes: int, seed: int, device: str
    ) -> list[dict[str, float]]:
        """Train ``strategy.module`` in place and leave its best epoch in it.

        Parameters
        ----------
        strategy
            Built; the parameters of its module that require gradients are trained.
        train, val
            Labelled cells.
        n_classes, seed, device
            Number of classes, seed of the order of the cells, and where to train.

        Returns
        -------
        list of dict
            One row an epoch: epoch (from 1), train_loss (mean over the epoch's steps, with class weights where asked
            for), val_loss (mean negative log probability), val_macro_f1.

        Raises
        ------
        FloatingPointError
            If the loss is no longer finite; names epoch and step.
        """
        import torch

        from ._device import resolve_device
        from ._random import seeded

        config, module = strategy.training, strategy.trained_module()
        where = resolve_device(device)
        module.to(where)
        codes, val_codes = (np.asarray(cells.codes, dtype=np.int64) for cells in (train, val))
        weights = torch.from_numpy(class_weights(codes, n_classes, config.class_weight)).to(where)
        optimizer = torch.optim.AdamW(_parameter_groups(strategy, config))
        generator = torch.Generator().manual_seed(seed)
        history: list[dict[str, float]] = []
        best: tuple[float, float] | None = None
        best_weights: dict[str, torch.Tensor] = {}
        waited = 0
        show = settings.progress if self.progress is None else self.progress
        with tqdm(total=config.max_epochs, desc=strategy.name, unit="epoch", disable=not show, leave=False) as bar:
            for epoch in range(1, config.max_epochs + 1):
                module.train()
                total = 0.0
                with seeded(seed, epoch, device=where):  # dropout
                    for step, rows in enumerate(strategy.batches(train, config.batch_size, generator), start=1):
                        labels = torch.from_numpy(codes[rows]).to(where)
                        losses = torch.nn.functional.cross_entropy(
                            strategy.logits(train.subset(rows)), labels, reduction="none"
                        )
                        loss = (losses * weights[labels]).mean()
                        value = loss.item()
                        if not math.isfinite(value):
                            raise FloatingPointError(
                                f"The loss of {strategy.name!r} is {value} at epoch {epoch}, step {step}; "
                                f"lower learning_rate ({config.learning_rate:g}) and check the input for extreme values."
                            )
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        if config.gradient_clip is not None:
                            torch.nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clip)
                        optimizer.step()
                        total += value * len(rows)
                probabilities = strategy.probabilities(val, n_classes)
                row = {
                    "epoch": epoch,
                    "train_loss": total / len(codes),
                    "val_loss": log_loss(val_codes, probabilities),
                    "val_macro_f1": macro_f1(val_codes, probabilities.argmax(1), n_classes),
                }
                history.append(row)
                bar.set_postfix(loss=f"{row['train_loss']:.3f}", val_macro_f1=f"{row['val_macro_f1']:.3f}")
                bar.update()
                quality = (row["val_macro_f1"], -row["val_loss"])
                if best is None or quality > best:
                    best, waited = quality, 0
                    best_weights = {name: value.detach().clone() for name, value in _trained(module)}
                else:
                    waited += 1
                    if waited >= config.patience:
                        break
        with torch.no_grad():
            for name, parameter in _trained(module):
                parameter.copy_(best_weights[name])
        module.eval()
        return history


def class_weights(codes: np.ndarray, n_classes: int, how: str | None) -> np.ndarray:
    """Weight of each class in the loss, float32 ``[n_classes]``; they average 1 over the cells, absent classes get 0.

    ``"balanced"`` is one over the number of cells of a class, ``"effective"`` one over their effective number,
    (1 - beta^n) / (1 - beta) with beta 0.999 (Cui et al. 2019, https://arxiv.org/abs/1901.05555).

    Example
    -------
    >>> class_weights(np.array([0, 0, 0, 1]), 2, "balanced")
    array([0.6666667, 2.       ], dtype=float32)
    """
    counts = np.bincount(codes, minlength=n_classes).astype(np.float64)
    if how is None:
        return np.ones(n_classes, dtype=np.float32)
    size = counts if how == "balanced" else (1 - _EFFECTIVE_BETA**counts) / (1 - _EFFECTIVE_BETA)
    weights = np.divide(1.0, size, out=np.zeros_like(size), where=counts > 0)
    return (weights * counts.sum() / (weights * counts).sum()).astype(np.float32)


def _trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


def _parameter_groups(strategy: GradientStrategy, config: TrainingConfig) -> list[dict[str, object]]:
    """Groups with equal learning rate and weight decay; embeddings, biases and norms do not decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, value in _trained(strategy.trained_module()):
        decay = config.weight_decay if value.ndim > 1 and "embedding" not in name else 0.0
        groups.setdefault((config.learning_rate * strategy.learning_rate_scale(name), decay), []).append(value)
    return [{"params": values, "lr": rate, "weight_decay": decay} for (rate, decay), values in groups.items()]
