"""Strategies: ways to turn labelled cells into a classifier, one file each, found by name."""

from __future__ import annotations

from ._base import GradientStrategy, Strategy, Trainer
from ._build import build_strategies
from ._cells import CellData
from ._config import Config, TrainingConfig
from ._registry import available_strategies, get_strategy, register
from .frozen_probe import FrozenProbe, FrozenProbeConfig
from .head import Head, HeadConfig
from .pca_logreg import PCALogReg, PCALogRegConfig

__all__ = [
    "CellData",
    "Config",
    "FrozenProbe",
    "FrozenProbeConfig",
    "GradientStrategy",
    "Head",
    "HeadConfig",
    "PCALogReg",
    "PCALogRegConfig",
    "Strategy",
    "Trainer",
    "TrainingConfig",
    "available_strategies",
    "build_strategies",
    "get_strategy",
    "register",
]
