"""scdlkit: adapt the single-cell foundation model scGPT to your own cell-type labels."""

from __future__ import annotations

from importlib.metadata import version

from ._settings import settings

__version__ = version("scdlkit")
__all__ = ["settings"]
