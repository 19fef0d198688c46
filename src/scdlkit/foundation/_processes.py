"""Several processes at work on one fit (torchrun, accelerate launch): which one this is, and results put together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Processes(NamedTuple):
    """One process among those that work together."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0


def launched_processes() -> int:
    """How many processes were started together, as the launcher or ``torch.distributed`` says; 1 without either."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        started = max(started, torch.distributed.get_world_size())
    return started


def is_main_process() -> bool:
    """Whether this process writes files: the first of those launched together, or the only one."""
    return launched_processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def join(device: torch.device) -> Accelerator:
    """The Accelerator of this process; the first call meets the others where there are several.

    Parameters
    ----------
    device
        Where this process computes.

    Raises
    ------
    RuntimeError
        If several processes were launched and this one would work alone.
    """
    from accelerate import Accelerator
    from accelerate.state import PartialState

    started = launched_processes()
    if started > 1 and "RANK" not in os.environ and not torch.distributed.is_initialized():
        raise RuntimeError(
            f"WORLD_SIZE is {started} but RANK is not set, so the processes cannot find each other. Start them with "
            f"`torchrun --nproc-per-node {started} script.py`, or unset WORLD_SIZE."
        )
    # Processes on CPUs join only if told so at the start; later calls take up what the first one found.
    first = not PartialState._shared_state
    accelerator = Accelerator(cpu=first and device.type == "cpu", mixed_precision="no")  # see training.py
    if accelerator.num_processes != started:
        raise RuntimeError(
            f"{started} processes were launched (WORLD_SIZE), but this one sees {accelerator.num_processes}: each would "
            f"train alone and write over the others. Start with `torchrun --nproc-per-node {started} script.py`, and "
            "create no Accelerator and no PartialState of your own before."
        )
    if started > 1 and accelerator.device.type != device.type:
        raise RuntimeError(
            f"The {started} processes met on {accelerator.device.type!r} and device is {device.type!r}; use one device "
            "throughout a run."
        )
    return accelerator


def processes(device: torch.device | None = None) -> Processes:
    """Where this process stands among all; alone, without asking Accelerate, unless several were launched."""
    if launched_processes() == 1:
        return Processes(0, 1)
    accelerator = join(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Processes(accelerator.process_index, accelerator.num_processes)


def put_together(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """The whole of an array of which every process has filled some rows and left the others 0."""
    if processes(device).size == 1:
        return rows
    from accelerate.utils import reduce

    return reduce(torch.from_numpy(rows).to(device), "sum").cpu().numpy()


def from_main(read: Callable[[], T], device: torch.device) -> T:
    """What ``read`` gives in the main process, for all processes; a ValueError of it is raised in all."""
    here = processes(device)
    if here.size == 1:
        return read()
    from accelerate.utils import broadcast_object_list

    message: list[Any] = [None, None]
    if here.is_main:
        try:
            message[0] = read()
        except ValueError as error:
            message[1] = error
    broadcast_object_list(message)
    if message[1] is not None:
        raise message[1]
    return message[0]
