"""How a training step fits on the device, and what a run will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from scdlkit._settings import logger

from ._memory import PeakMemory

MAX_TRAINING_TOKENS = {"cpu": 32_768, "mps": 32_768}  # padded tokens of a forward and backward pass
_SHARE_OF_MEMORY = 0.7  # of a CUDA device, for what the blocks keep for the way back
_SHARE_OF_HOST = 0.4  # which others need as well
_LONG_EPOCH = 60.0  # seconds
_ADAM_TENSORS = 2  # moments that AdamW keeps of each parameter


def token_budget(device: torch.device, bytes_per_token: float) -> int:
    """Most padded tokens that one piece of a training step may have on a device."""
    # of all memory, not of what is free now: the pieces should not depend on who else uses it
    if device.type == "cuda":
        memory = _SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory
    else:
        memory = _SHARE_OF_HOST * psutil.virtual_memory().total
    fitting = max(1, int(memory / max(bytes_per_token, 1.0)))
    return min(fitting, MAX_TRAINING_TOKENS.get(device.type, fitting))


def pieces(rows: np.ndarray, lengths: np.ndarray | None, *, at_least: int, max_tokens: int) -> list[np.ndarray]:
    """Cut the cells of a step into pieces of about one size.

    Parameters
    ----------
    rows
        Positions of the cells.
    lengths
        Tokens of every cell of the data, or None where they do not matter.
    at_least
        Number of pieces, if there are as many cells.
    max_tokens
        Most padded tokens of a piece; a longer cell forms its own.
    """
    count = at_least
    if lengths is not None:
        fitting = max(1, max_tokens // int(lengths[rows].max()))
        count = max(count, -(-len(rows) // fitting))
    return np.array_split(rows, min(count, len(rows)))


@dataclass(frozen=True)
class Estimate:
    """What an epoch will take, from one timed step."""

    step_seconds: float
    epoch_seconds: float
    memory_mb: float

    def text(self, name: str, n_steps: int, max_epochs: int) -> str:
        """One sentence for the log."""
        return (
            f"{name}: about {_duration(self.epoch_seconds)} an epoch ({n_steps} steps), at most "
            f"{_duration(self.epoch_seconds * max_epochs)} for {max_epochs} epochs, and {self.memory_mb:,.0f} MB of memory "
            "(estimated from one step)."
        )


def preflight(
    name: str,
    try_step: Callable[[np.ndarray], object],
    batches: Sequence[np.ndarray],
    lengths: np.ndarray,
    *,
    n_trainable: int,
    max_epochs: int,
    device: torch.device,
) -> Estimate:
    """Try the most costly step of an epoch, which changes nothing, and log what training will take if that is long.

    Parameters
    ----------
    name
        Strategy, for the log.
    try_step
        Computes the gradients for the cells of a batch.
    batches
        Of one epoch.
    lengths
        Tokens of every cell.
    n_trainable
        Parameters that train.
    max_epochs
        Epochs, at most.
    device
        Where.
    """
    costs = np.array([int(lengths[rows].max()) * len(rows) for rows in batches])
    hardest = batches[int(costs.argmax())]
    with PeakMemory(str(device)) as memory:
        seconds = _seconds(try_step, hardest)
    if device.type == "cuda":  # the first step also loads libraries and compiles kernels, the second one is recorded
        _seconds(try_step, hardest)
        seconds = _seconds(try_step, hardest)
    moments = 4 * _ADAM_TENSORS * n_trainable / 1024**2
    found = Estimate(seconds, seconds * float(costs.sum() / costs.max()), memory.mb + moments)
    log = logger.info if found.epoch_seconds > _LONG_EPOCH else logger.debug
    log("%s", found.text(name, len(batches), max_epochs))
    return found


def _seconds(try_step: Callable[[np.ndarray], object], rows: np.ndarray) -> float:
    started = time.perf_counter()
    try_step(rows)
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
