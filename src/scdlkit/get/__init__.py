"""Results out of an AnnData, as tidy DataFrames."""

from __future__ import annotations

from ._efficiency import label_efficiency
from ._predictions import predictions
from ._tables import (
    differences,
    fold_metrics,
    history,
    leakage_gap,
    per_class_metrics,
    strategy_metrics,
    strategy_table,
)

__all__ = [
    "differences",
    "fold_metrics",
    "history",
    "label_efficiency",
    "leakage_gap",
    "per_class_metrics",
    "predictions",
    "strategy_metrics",
    "strategy_table",
]
