"""scdlkit: adapt the single-cell foundation model scGPT to your own cell-type labels, and learn if it is worth it.

``sk.pp`` checks and tokenizes, ``sk.tl`` adapts, predicts and embeds, ``sk.get`` returns results as tables, ``sk.pl``
draws them; the engine is ``sk.foundation``. Submodules load on first use, so that importing scdlkit is quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ._settings import settings

if TYPE_CHECKING:
    from . import foundation, get, pl, pp, tl
    from .inspection import ScGPTAnnotationDataReport
    from .pp import inspect_annotation_data
    from .runner import AnnotationRunner
    from .tl import adapt_annotation

__version__ = version("scdlkit")
__all__ = [
    "AnnotationRunner",
    "ScGPTAnnotationDataReport",
    "adapt_annotation",
    "foundation",
    "get",
    "inspect_annotation_data",
    "pl",
    "pp",
    "settings",
    "tl",
]

_SUBMODULES = ("foundation", "get", "pl", "pp", "tl")
_HOME = {
    "AnnotationRunner": ".runner",
    "ScGPTAnnotationDataReport": ".inspection",
    "adapt_annotation": ".tl",
    "inspect_annotation_data": ".pp",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        if name == "AnnotationRunner":
            from ._optional import require_foundation

            require_foundation()
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
