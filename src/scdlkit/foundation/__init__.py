"""The engine: arrays and tensors in, arrays and tensors out. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AdapterConfig": "strategies",
    "AnnotationHead": "model",
    "AnyPeftConfig": "strategies",
    "BitFitConfig": "strategies",
    "CellData": "strategies",
    "CellTypistConfig": "strategies",
    "Checkpoint": "checkpoints",
    "CheckpointInfo": "checkpoints",
    "Expression": "expression",
    "FrozenProbeConfig": "strategies",
    "FullFinetuneConfig": "strategies",
    "GeneMatch": "vocabulary",
    "HeadConfig": "strategies",
    "IA3Config": "strategies",
    "KNNFrozenConfig": "strategies",
    "LoRAConfig": "strategies",
    "LogRegGenesConfig": "strategies",
    "PCALogRegConfig": "strategies",
    "PrefixTuningConfig": "strategies",
    "ScGPTConfig": "model",
    "ScGPTEncoder": "model",
    "Split": "splits",
    "Strategy": "strategies",
    "TokenizerConfig": "tokens",
    "Tokens": "tokens",
    "TrainingConfig": "strategies",
    "Vocabulary": "vocabulary",
    "available_strategies": "strategies",
    "check_overlap": "gene_match",
    "checkpoint_info": "checkpoints",
    "choose_expression": "expression",
    "embed_tokens": "inference",
    "ensure_checkpoint": "checkpoints",
    "export_checkpoint": "export",
    "get_strategy": "strategies",
    "list_checkpoints": "checkpoints",
    "load_encoder": "weights",
    "make_split": "splits",
    "save_checkpoint": "weights",
    "tokenize": "tokens",
}
_NEEDS_TORCH = {"export", "inference", "model", "strategies", "weights"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] in _NEEDS_TORCH:
        from scdlkit._optional import require_foundation

        require_foundation()
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
