"""What the extra ``foundation`` brings, and the error when it is missing."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("torch", "peft")


def require_foundation() -> None:
    """Raise an ImportError that says what to install where PyTorch or peft is missing."""
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        raise ImportError(f'{" and ".join(missing)} not found. This needs the extra: pip install "scdlkit[foundation]"')


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook refuses, or the module is blocked in sys.modules
        return False
