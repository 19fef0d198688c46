"""What the extras bring, and the error when it is missing."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("torch", "peft")


def require_foundation() -> None:
    """Raise an ImportError that says what to install where PyTorch or peft is missing."""
    missing = [name for name in _NEEDED if not is_installed(name)]
    if missing:
        raise ImportError(f'{" and ".join(missing)} not found. This needs the extra: pip install "scdlkit[foundation]"')


def require_dask() -> None:
    """Raise an ImportError that says what to install where dask's cluster client is missing."""
    if not is_installed("distributed"):
        raise ImportError('distributed not found. client= needs the extra: pip install "scdlkit[dask]"')


def require_parquet() -> None:
    """Raise an ImportError that says what to install where parquet files cannot be written."""
    if not is_installed("pyarrow"):
        raise ImportError(
            'pyarrow not found. Parquet files need the extra: pip install "scdlkit[parquet]". A name that ends in .csv '
            "needs nothing."
        )


def require_package(name: str) -> None:
    """Raise an ImportError that says what to install where a package is missing; its extra has its name."""
    if not is_installed(name):
        raise ImportError(f'{name} not found. This needs the extra: pip install "scdlkit[{name}]"')


def is_installed(name: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # an import hook refuses, or the module is blocked in sys.modules
        return False
