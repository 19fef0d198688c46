"""A fitted model as a folder: ``manifest.json`` (plain values) and ``model_state.pt`` (tensors), nothing executable.

The folder appears complete or not at all. The manifest carries digests of itself and of the tensors, so a truncated,
swapped or edited file is told from a good one; this guards against accidents, it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._processes import is_main_process

FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "model_state.pt"
_REQUIRED = ("format_version", "state_sha256", "tensors", "manifest_digest")


def write_bundle(folder: str | os.PathLike[str], manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write a model folder, replacing an earlier one of the same format.

    Of several processes that were launched together the first one writes, the others return at once.

    Parameters
    ----------
    folder
        Target. A folder that holds anything but an earlier model is left alone.
    manifest
        JSON-able values.
    tensors
        Named tensors.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If ``folder`` holds files that are not a saved model.
    """
    folder = Path(folder)
    if not is_main_process():
        return folder
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        torch.save(own, unfinished / STATE)
        content = {
            **manifest,
            "format_version": FORMAT_VERSION,
            "state_sha256": _sha256(unfinished / STATE),
            "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in own.items()},
        }
        content["manifest_digest"] = _digest(content)
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (unfinished / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        unfinished.chmod(0o755)
        _swap(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def check_folder(folder: Path) -> None:
    """Raise a ValueError if a model may not be written to ``folder``, since it holds anything but an earlier one."""
    if folder.is_dir():
        if foreign := sorted({path.name for path in folder.iterdir()} - {MANIFEST, STATE}):
            raise ValueError(
                f"path {folder} holds {', '.join(foreign[:5])}, not only a saved model; choose a new folder."
            )
    elif folder.exists():
        raise ValueError(f"path {folder} is a file, not a folder for a model; choose another.")


def read_bundle(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a model folder; nothing in it is executed.

    Returns
    -------
    tuple
        The manifest and the tensors.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If the manifest is incomplete, from another format version or edited, or the tensors are not the ones it names.
    """
    from .weights import read_weights

    folder = Path(folder)
    for name in (MANIFEST, STATE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"path {folder} holds no {name}: it is not a model saved by AnnotationRunner.save.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is not valid JSON: {error}.") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder / MANIFEST} holds {type(manifest).__name__}, not an object.")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / MANIFEST} has format version {version!r}; this version of scdlkit reads {FORMAT_VERSION}. "
            "Fit again, or use the version of scdlkit that wrote it."
        )
    if missing := [name for name in _REQUIRED if name not in manifest]:
        raise ValueError(f"{folder / MANIFEST} is incomplete: it lacks {', '.join(missing)}.")
    if manifest["manifest_digest"] != _digest(manifest):
        raise ValueError(
            f"{folder / MANIFEST} was changed after it was written (its digest differs); save the model again."
        )
    if manifest["state_sha256"] != _sha256(folder / STATE):
        raise ValueError(f"{folder / STATE} is corrupt or not the file that the manifest names (its sha256 differs).")
    tensors = read_weights(folder / STATE)
    for name, (_, shape) in manifest["tensors"].items():
        if name not in tensors or list(tensors[name].shape) != shape:
            found = list(tensors[name].shape) if name in tensors else "no such tensor"
            raise ValueError(f"{folder / STATE}: tensor {name} should have shape {shape}, found {found}.")
    return manifest, tensors


def _swap(new: Path, folder: Path) -> None:
    """Put ``new`` in place of ``folder``; a crash leaves the old or the new one under its name or beside it."""
    if not folder.exists():
        new.replace(folder)
        return
    old = new.with_name(f"{new.name}-old")
    folder.replace(old)
    try:
        new.replace(folder)
    except BaseException:  # an interrupt too
        old.replace(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "manifest_digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
