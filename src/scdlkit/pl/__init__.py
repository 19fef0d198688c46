"""Figures of an annotation result.

All take ``ax`` (draw there), ``show`` and ``save`` (a path) and return the Axes when ``show=False``.
"""

from __future__ import annotations

from ._annotation_umap import annotation_umap
from ._confusion_matrix import confusion_matrix
from ._gene_overlap import gene_overlap
from ._reliability import reliability
from ._strategy_comparison import strategy_comparison
from ._strategy_tradeoff import strategy_tradeoff
from ._training_history import training_history

__all__ = [
    "annotation_umap",
    "confusion_matrix",
    "gene_overlap",
    "reliability",
    "strategy_comparison",
    "strategy_tradeoff",
    "training_history",
]
