"""The one training loop, on Accelerate: AdamW, early stopping on validation macro-F1, best epoch restored.

- Randomness is the order of the cells and dropout. Both are seeded anew in every epoch, so a fit depends on the seed and
  on nothing that ran before it, and one that goes on from a saved epoch is the one that was never interrupted.
- A step is ``batch_size`` cells however it is computed: cut into pieces whose gradients are summed, to fit the device,
  and shared out among processes. The result is the same but for rounding and dropout.
- Accelerate finds the other processes, wraps the module and moves gradients. Mixed precision is PyTorch's own autocast:
  Accelerate fixes one precision for the life of a process, and strategies of one comparison may differ.
"""

from __future__ import annotations

import os
import time

import numpy as np
from tqdm.auto import tqdm

from scdlkit._settings import logger, settings

from .strategies import CellData, GradientStrategy, TrainingConfig
from .strategies._scores import log_loss, macro_f1

__all__ = ["Trainer", "TrainingConfig", "class_weights"]

_EFFECTIVE_BETA = 0.999
_PREFLIGHT_STEPS = 50  # a run of fewer is not worth a trial


class Trainer:
    """Trains any :class:`~scdlkit.foundation.strategies.GradientStrategy` as its ``config.training`` says.

    Under ``torchrun`` or ``accelerate launch`` all processes must make the same calls with the same cells; the first
    one alone writes and shows progress.

    Parameters
    ----------
    progress
        Show a progress bar with loss, validation macro-F1 and time left; the setting by default.
    state_dir
        Folder in which every finished epoch is kept, one file a strategy, ``<name>.training.pt``.
    resume
        Go on from what ``state_dir`` holds: with the same cells, config and seed the result is, on a CPU, exactly that
        of a run without interruption. A training that was finished is not repeated.

    Raises
    ------
    ValueError
        If ``resume`` is asked for without a ``state_dir``.

    Example
    -------
    >>> head = Head()
    >>> head.fit(train, val, n_classes=8, seed=42, trainer=Trainer())
    >>> head.history[0]
    {'epoch': 1, 'train_loss': 1.21, 'val_loss': 0.63, 'val_macro_f1': 0.71}
    """

    def __init__(
        self,
        *,
        progress: bool | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> None:
        if resume and state_dir is None:
            raise ValueError("resume=True needs state_dir, the folder in which the interrupted run kept its epochs.")
        self.progress, self.state_dir, self.resume = progress, state_dir, resume
        self.seconds_before = 0.0  # that interrupted runs had spent on what was trained last

    def warm_up(self) -> None:
        """Take one step on nothing, so that what PyTorch loads for its first step is not taken for training time."""
        import accelerate  # noqa: F401
        import torch

        from ._adamw import AdamW

        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()

    def train(
        self, strategy: GradientStrategy, train: CellData, val: CellData, *, n_classes: int, seed: int, device: str
    ) -> list[dict[str, float]]:
        """Train ``strategy.module`` in place and leave its best epoch in it, also when it is interrupted.

        Parameters
        ----------
        strategy
            Built; the parameters of its module that require gradients are trained. Its ``history`` grows with every
            epoch.
        train, val
            Labelled cells.
        n_classes, seed, device
            Number of classes, seed of the order of the cells and of dropout, and where to train.

        Returns
        -------
        list of dict
            One row an epoch: epoch (from 1), train_loss (mean over the epoch's steps, with class weights and label
            smoothing where asked for), val_loss (mean negative log probability), val_macro_f1.

        Raises
        ------
        FloatingPointError
            If the loss is no longer finite; names epoch, step and cells.
        RuntimeError
            If several processes were launched and this one sees no other.
        ValueError
            If the device lacks the precision, or the saved state is of another run.
        """
        from ._device import resolve_device
        from ._fit import Fit

        where, config = resolve_device(device), strategy.training
        weights = class_weights(np.asarray(train.codes, dtype=np.int64), n_classes, config.class_weight)
        started = time.perf_counter()
        fit = Fit(strategy, train, class_weights=weights, seed=seed, device=where)
        file = None
        if self.state_dir is not None:
            from ._processes import from_main
            from ._training_state import StateFile, describe_run

            run = describe_run(strategy, train, val, n_classes=n_classes, seed=seed)
            file = StateFile(self.state_dir, strategy.name, run)
            if self.resume and (saved := from_main(file.read, where)) is not None:
                fit.restore(saved)
                logger.info("%s: goes on after epoch %d, from %s.", strategy.name, saved.progress.epoch, file.path)
        progress = fit.progress
        self.seconds_before = progress.seconds
        strategy.history = progress.history
        val_codes = np.asarray(val.codes, dtype=np.int64)
        show = (settings.progress if self.progress is None else self.progress) and fit.is_main
        total = config.max_epochs * fit.steps_per_epoch
        try:
            if not progress.finished:
                fit.compile()
            if not progress.finished and total >= _PREFLIGHT_STEPS:
                fit.preflight()
            with tqdm(
                total=total, initial=progress.step, desc=strategy.name, unit="step", disable=not show, leave=False
            ) as bar:
                while not progress.finished:
                    train_loss = fit.run_epoch(bar)
                    probabilities = fit.probabilities(val, n_classes)
                    row = {
                        "epoch": progress.epoch,
                        "train_loss": train_loss,
                        "val_loss": log_loss(val_codes, probabilities),
                        "val_macro_f1": macro_f1(val_codes, probabilities.argmax(1), n_classes),
                    }
                    fit.judge(row)
                    bar.set_postfix(loss=f"{train_loss:.3f}", val_macro_f1=f"{row['val_macro_f1']:.3f}")
                    progress.seconds = self.seconds_before + time.perf_counter() - started
                    if file is not None and fit.is_main:
                        file.write(fit.saved())
        except KeyboardInterrupt:
            logger.warning("%s: interrupted in epoch %d.", strategy.name, progress.epoch)
            raise
        finally:
            fit.leave_best()
        return progress.history


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
