"""torch.compile for training: one function that all blocks of an encoder share, so that it is compiled once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor, nn

from scdlkit._settings import logger

from ._block_steps import Cells
from .model import Block


def compile_blocks(name: str, module: nn.Module, try_steps: Callable[[], object]) -> None:
    """Let the blocks inside ``module`` compute by a compiled function while they train; as before if that fails.

    Names, modules and weights stay as they are, and so does the result but for rounding and for the numbers that dropout
    draws.

    Parameters
    ----------
    name
        Strategy, for the log.
    module
        In training mode.
    try_steps
        Goes forward and backward through the blocks, which compiles them.
    """
    blocks = _blocks(module)
    if not blocks:
        return
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's advice to its developers
            compiled = torch.compile(_function_of_its_own(), dynamic=True)
            for block in blocks:
                block.compiled = compiled
            try_steps()
    except Exception as error:  # noqa: BLE001 - if it is not the compiler's, training without it meets it again
        release_blocks(module)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("%s: torch.compile failed, training goes on without it: %s", name, reason)
    else:
        logger.info("%s: compiled in %.0f s.", name, time.perf_counter() - started)


def release_blocks(module: nn.Module) -> None:
    """Undo :func:`compile_blocks`."""
    for block in _blocks(module):
        block.compiled = None


def _function_of_its_own() -> Callable[[Block, Tensor, Cells], Tensor]:
    """:func:`_compute` with a code object of its own.

    PyTorch keeps with the code of a function what it compiled for it, 8 times at most. So strategies whose blocks differ
    do not use up each other's share, and what was compiled goes with the fit.
    """
    return FunctionType(_compute.__code__.replace(), _compute.__globals__, _compute.__name__)


def _compute(block: Block, x: Tensor, cells: Cells) -> Tensor:
    return block.compute(x, cells)


def _blocks(module: nn.Module) -> list[Block]:
    return [part for part in module.modules() if isinstance(part, Block)]
