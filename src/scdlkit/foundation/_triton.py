"""Whether Triton works here: it comes with PyTorch for CUDA on Linux, and needs a C compiler to start a kernel."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from scdlkit._settings import logger


@cache
def kernels(name: str, device: torch.device) -> ModuleType | None:
    """A module of this package that is made of Triton's kernels, or None where they can't run."""
    return importlib.import_module(f".{name}", __package__) if works(device) else None


@cache
def works(device: torch.device) -> bool:
    """Whether a kernel ran on this CUDA device, once; a warning is logged where Triton is there and it did not."""
    try:
        from ._layer_norm_triton import layer_norm_
    except ImportError:
        return False
    try:
        one = torch.ones(1, 16, device=device)
        layer_norm_(one, one[0], one[0], 1e-5)
    except torch.cuda.OutOfMemoryError:  # which says nothing of Triton
        raise
    except Exception as error:  # noqa: BLE001 - it may be that of a compiler, a linker or a driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            "Triton is installed but cannot run (%s), so the GPU is used through PyTorch's layers, which is slower. It needs "
            "a C compiler and the header files of Python, which are gcc and python3-dev on Debian and Ubuntu.", reason,
        )  # fmt: skip
        return False
    return True
