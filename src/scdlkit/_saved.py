"""A fitted model <-> a model folder (see ``foundation/bundle.py`` for the files themselves)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch

from ._keys import TABLES
from ._run_config import RunnerConfig
from .foundation.bundle import read_bundle, write_bundle
from .foundation.checkpoints import Checkpoint, ensure_checkpoint, list_checkpoints
from .foundation.known_cells import KnownCells
from .foundation.strategies import get_strategy
from .inspection import ScGPTAnnotationDataReport

if TYPE_CHECKING:
    from ._fitted import FittedModel

_Model = TypeVar("_Model", bound="FittedModel")

_PACKAGES = ("scdlkit", "torch", "peft", "scikit-learn", "scanpy", "anndata", "numpy", "pandas")
_REQUIRED = (
    "config", "checkpoint", "label_key", "classes", "genes", "strategies", "best_strategy", "recommendation",
    "interrupted", "report", "tables",
)  # fmt: skip


def write_runner(runner: FittedModel, path: str | os.PathLike[str]) -> Path:
    """Write what a fitted runner learnt; see :meth:`scdlkit.AnnotationRunner.save`."""
    reference = runner._reader.checkpoint
    # by what the user asked for: a folder of one's own may be called as a registered checkpoint is
    known = isinstance(runner.checkpoint, str) and runner.checkpoint in set(list_checkpoints()["name"])
    tensors = {
        f"{name}/{key}": tensor
        for name, strategy in runner._fitted.items()
        for key, tensor in strategy.state_dict().items()
    }
    # torch has few operations on uint64: the bits travel as int64
    tensors["cells/keys"] = torch.from_numpy(runner._known.keys.view(np.int64).copy())
    tensors["cells/split"] = torch.from_numpy(runner._known.split.copy())
    manifest = {
        "config": _plain(asdict(runner.config)),
        "checkpoint": {
            "name": reference.name,
            "path": None if known else str(reference.folder.resolve()),
            "sha256": reference.sha256,
        },
        "label_key": runner.label_key_,
        "classes": [str(name) for name in runner.classes_],
        "genes": [str(name) for name in runner._genes],
        "strategies": {
            name: {"type": type(strategy).name, "config": strategy.config.to_dict(), "metadata": strategy.metadata()}
            for name, strategy in runner._fitted.items()
        },
        "best_strategy": runner.best_strategy_,
        "recommendation": runner.recommendation_,
        "interrupted": runner.interrupted_,
        "report": _plain(runner.report_.to_dict()),
        "tables": {name: _to_records(getattr(runner, attribute)) for name, attribute in TABLES.items()},
        "versions": {name: found for name in _PACKAGES if (found := _installed(name))},
    }
    return write_bundle(path, manifest, tensors)


def fingerprint(runner: FittedModel, strategy: str) -> str:
    """Hex digest of all that predictions of a fitted strategy depend on; the same after saving and loading."""
    digest = hashlib.blake2b(digest_size=16)
    plain = {
        "config": asdict(runner.config),
        "checkpoint": runner._reader.checkpoint.sha256,
        "classes": list(runner.classes_),
        "strategy": strategy,
    }
    digest.update(json.dumps(_plain(plain), sort_keys=True).encode())
    fitted = runner._find_fitted(strategy)
    for name, tensor in sorted(fitted.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(runner._known.keys.data)
    return digest.hexdigest()


def read_runner(
    cls: type[_Model],
    path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None,
    device: str | None,
    progress: bool | None,
) -> _Model:
    """Rebuild a fitted runner; see :meth:`scdlkit.AnnotationRunner.load`."""
    manifest, tensors = read_bundle(path)
    missing = [name for name in _REQUIRED if name not in manifest]
    missing += [f"tensor {name}" for name in ("cells/keys", "cells/split") if name not in tensors]
    recorded = manifest.get("checkpoint", {})
    missing += [f"checkpoint {name}" for name in ("name", "path", "sha256") if name not in recorded]
    if missing:
        raise ValueError(f"{path}: the model is incomplete, it lacks {', '.join(missing)}.")
    where = checkpoint or recorded["path"] or recorded["name"]
    if checkpoint is None and recorded["path"] and not Path(recorded["path"]).is_dir():
        raise ValueError(
            f"{path}: the model was fitted on a checkpoint in {recorded['path']}, which is not there; pass "
            "checkpoint= the folder where it is now."
        )
    reference = ensure_checkpoint(where, progress=progress)
    if reference.sha256 != recorded["sha256"]:
        raise ValueError(
            f"The model was fitted on checkpoint {recorded['name']!r} with sha256 {recorded['sha256']}, but "
            f"{reference.folder} has {reference.sha256}. Pass checkpoint= the folder of the original one."
        )
    try:
        return _rebuild(cls, path, manifest, tensors, reference, where, device, progress)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: the manifest is incomplete or was written by another version of scdlkit "
            f"({manifest.get('versions')}): {type(error).__name__}: {error}"
        ) from error


def _rebuild(
    cls: type[_Model],
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    reference: Checkpoint,
    checkpoint: str | os.PathLike[str],
    device: str | None,
    progress: bool | None,
) -> _Model:
    runner = cls.__new__(cls)
    runner._restore(RunnerConfig(**manifest["config"]), checkpoint, [], device, progress)
    reader = runner._use_checkpoint(reference)
    for name, entry in manifest["strategies"].items():
        strategy = get_strategy(entry["type"])(entry["config"], name=name)
        strategy.source = reader
        state = {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
        strategy.load_state(state, entry["metadata"])
        if strategy.n_classes != len(manifest["classes"]):
            raise ValueError(
                f"{path}: strategy {name!r} knows {strategy.n_classes} classes, the manifest names "
                f"{len(manifest['classes'])}."
            )
        runner._fitted[name] = strategy
    runner._strategies = list(runner._fitted.values())
    if manifest["best_strategy"] not in runner._fitted:
        raise ValueError(f"{path}: the best strategy {manifest['best_strategy']!r} is not among the saved ones.")
    runner._known = KnownCells(
        tensors["cells/keys"].numpy().view(np.uint64), tensors["cells/split"].numpy(), np.empty(0, np.uint64), None
    )
    runner._genes = np.array(manifest["genes"], dtype=object)
    runner.classes_ = np.array(manifest["classes"], dtype=object)
    runner.label_key_ = manifest["label_key"]
    runner.best_strategy_ = manifest["best_strategy"]
    runner.recommendation_ = manifest["recommendation"]
    runner.interrupted_ = manifest["interrupted"]
    runner.report_ = ScGPTAnnotationDataReport(**manifest["report"])
    for name, attribute in TABLES.items():
        setattr(runner, attribute, _from_records(manifest["tables"][name]))
    return runner


def _to_records(table: pd.DataFrame) -> dict[str, Any]:
    """Columns, types and rows as plain values; NaN becomes null."""
    return {
        "columns": {str(name): str(dtype) for name, dtype in table.dtypes.items()},
        "rows": [[_plain(value) for value in row] for row in table.itertuples(index=False)],
    }


def _from_records(content: Mapping[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(content["rows"], columns=list(content["columns"]))
    return table.astype({name: dtype for name, dtype in content["columns"].items() if dtype != "object"})


def _plain(value: Any) -> Any:
    """NumPy values and NaN as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
