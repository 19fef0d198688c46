"""Strategies: ways to turn labelled cells into a classifier, one file each, found by name."""

from __future__ import annotations

from ._base import GradientStrategy, Strategy, Trainer
from ._build import all_baselines, build_strategies
from ._cells import CellData
from ._config import Config, TrainingConfig
from ._registry import available_strategies, get_strategy, register
from .adapter import Adapter, AdapterConfig
from .any_peft import AnyPeft, AnyPeftConfig
from .bitfit import BitFit, BitFitConfig
from .celltypist import CellTypist, CellTypistConfig
from .frozen_probe import FrozenProbe, FrozenProbeConfig
from .full_finetune import FullFinetune, FullFinetuneConfig
from .head import Head, HeadConfig
from .ia3 import IA3, IA3Config
from .knn_frozen import KNNFrozen, KNNFrozenConfig
from .logreg_genes import LogRegGenes, LogRegGenesConfig
from .lora import LoRA, LoRAConfig
from .pca_logreg import PCALogReg, PCALogRegConfig
from .prefix_tuning import PrefixTuning, PrefixTuningConfig

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AnyPeft",
    "AnyPeftConfig",
    "BitFit",
    "BitFitConfig",
    "CellData",
    "CellTypist",
    "CellTypistConfig",
    "Config",
    "FrozenProbe",
    "FrozenProbeConfig",
    "FullFinetune",
    "FullFinetuneConfig",
    "GradientStrategy",
    "Head",
    "HeadConfig",
    "IA3",
    "IA3Config",
    "KNNFrozen",
    "KNNFrozenConfig",
    "LoRA",
    "LoRAConfig",
    "LogRegGenes",
    "LogRegGenesConfig",
    "PCALogReg",
    "PCALogRegConfig",
    "PrefixTuning",
    "PrefixTuningConfig",
    "Strategy",
    "Trainer",
    "TrainingConfig",
    "all_baselines",
    "available_strategies",
    "build_strategies",
    "get_strategy",
    "register",
]
