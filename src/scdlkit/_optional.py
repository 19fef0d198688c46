"""What the extra ``foundation`` brings, and the error when it is missing."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("torch", "peft")


def require_foundation() -> None:
    """Raise an ImportError that says what to install where PyTorch or peft is missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} not found. This needs the extra: pip install "scdlkit[foundation]"')
