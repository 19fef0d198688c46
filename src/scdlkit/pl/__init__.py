"""Figures of an annotation result.

All take ``ax`` (draw there), ``show`` and ``save`` (a path) and return the Axes when ``show=False``.
"""

from __future__ import annotations

from ._annotation_umap import annotation_umap
from ._confusion_matrix import confusion_matrix
from ._gene_overlap import gene_overlap
from ._label_efficiency import label_efficiency
from ._leakage_gap import leakage_gap
from ._per_class_f1 import per_class_f1
from ._reliability import reliability
from ._strategy_comparison import strategy_comparison
from ._strategy_differences import strategy_differences
from ._strategy_tradeoff import strategy_tradeoff
from ._strategy_umaps import strategy_umaps
from ._training_history import training_history

__all__ = [
    "annotation_umap",
    "confusion_matrix",
    "gene_overlap",
    "label_efficiency",
    "leakage_gap",
    "per_class_f1",
    "reliability",
    "strategy_comparison",
    "strategy_differences",
    "strategy_tradeoff",
    "strategy_umaps",
    "training_history",
]
