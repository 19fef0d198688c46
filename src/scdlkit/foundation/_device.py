"""Which device the encoder runs on."""

from __future__ import annotations

import torch

from scdlkit._settings import settings


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
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps', found {name!r}.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use 'auto'.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps', but PyTorch sees no Apple GPU; use 'auto'.")
    return found
