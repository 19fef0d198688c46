"""Which device the encoder runs on, and in which precision."""

from __future__ import annotations

import os
from functools import cache

import torch

from scdlkit._settings import logger, settings


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """``None`` means the setting, ``"auto"`` CUDA where there is one, else the CPU.

    Raises
    ------
    ValueError
        If the device is unknown or not there.
    """
    name = str(settings.device if device is None else device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # one of several processes of torchrun: each has its own
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps', found {name!r}.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use 'auto'.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps', but PyTorch sees no Apple GPU; use 'auto'.")
    return found


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Type of the mixed-precision forward pass, None for plain float32.

    ``"auto"`` is bf16 on CUDA devices that compute in it, fp16 on older ones, float32 elsewhere.

    Raises
    ------
    ValueError
        If the device does not have the precision.
    """
    cuda = device.type == "cuda"
    has_bf16 = _gpu_has_bf16(device) if cuda else device.type == "cpu"
    if precision == "auto":
        precision = "fp32" if not cuda else "bf16" if has_bf16 else "fp16"
    if (precision == "bf16" and not has_bf16) or (precision == "fp16" and not cuda):
        raise ValueError(f"precision={precision!r} is not there on device {str(device)!r}; use 'auto' or 'fp32'.")
    if precision == "bf16" and not cuda:
        _warn_if_slow(precision)
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _gpu_has_bf16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # PyTorch asks the current one
        return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _warn_if_slow(precision: str) -> None:
    if not cpu_has_bf16():
        also = ", in which int8 computes as well" if precision == "int8" else ""
        logger.warning("This CPU has no instructions for bfloat16%s; precision='fp32' will be faster.", also)


def embedding_precision(precision: str | None, device: torch.device) -> str:
    """``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"`` for a frozen encoder; None means the setting.

    Raises
    ------
    ValueError
        If it is unknown or the device does not have it.
    """
    name = settings.precision if precision is None else precision
    if name == "auto" and device.type == "cuda":
        return "fp16"  # as fast as bf16 and eight times as exact; layer norms keep the states in its range
    if name == "int8" and device.type == "cpu":
        _warn_if_slow(name)
        return name
    if name not in {"auto", "fp32", "bf16", "fp16"}:
        raise ValueError(
            f"precision must be 'auto', 'fp32', 'bf16', 'fp16' (GPU) or 'int8' (CPU), found {name!r} on {str(device)!r}."
        )
    dtype = autocast_dtype(name, device)
    return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
