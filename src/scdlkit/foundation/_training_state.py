"""Training on disk: after every epoch all that it needs to go on exactly, in one file that is replaced at once."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .expression_rows import ExpressionRows
from .strategies import CellData, Strategy

_FORMAT = 1
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_LONGEST = 120  # signs of a file name without its ending


@dataclass
class Progress:
    """How far a training has come, but for its tensors."""

    epoch: int = 0
    step: int = 0
    waited: int = 0  # epochs since the best one
    accumulation: int = 1
    best: tuple[float, float] | None = None  # validation macro-F1 and negative loss
    finished: bool = False
    seconds: float = 0.0  # that the training took
    history: list[dict[str, float]] = field(default_factory=list)


class Saved(NamedTuple):
    """A training as it was saved."""

    progress: Progress
    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


class StateError(ValueError):
    """What is on disk belongs to another run, or cannot be read."""


class StateFile:
    """The file of one training.

    Parameters
    ----------
    folder
        Where; one file a strategy, named after it.
    name
        Name of the strategy.
    run
        What the training depends on, from :func:`describe_run`.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str, run: Mapping[str, Any]) -> None:
        self.name, self.run = name, dict(run)
        self.path = Path(folder) / f"{file_stem(name)}.training.pt"

    def write(self, saved: Saved) -> None:
        """Replace the file; a crash leaves the old or the new one, never half of one."""
        plain = {"format": _FORMAT, "run": self.run, "progress": asdict(saved.progress)}
        write_file(self.path, {**saved._asdict(), "progress": json.dumps(plain)})

    def read(self) -> Saved | None:
        """What was saved, None if nothing was.

        Raises
        ------
        StateError
            If the file is of another run: other cells, config, seed or classes.
        """
        if not self.path.is_file():
            return None
        content = read_file(self.path)
        plain = json.loads(content["progress"])
        check_same(self.path, f"run of {self.name!r}", plain["run"], self.run, plain["format"], _FORMAT)
        progress = Progress(**plain["progress"])
        progress.best = None if progress.best is None else (progress.best[0], progress.best[1])
        return Saved(progress, *(content[part] for part in Saved._fields[1:]))


def file_stem(name: str) -> str:
    """A file name for any name, and another one for any other, also where case or Unicode forms are not told apart."""
    plain = "".join(sign if sign in _PLAIN else "".join(f"%{byte:02X}" for byte in sign.encode()) for sign in name)
    if len(plain) <= _LONGEST:
        return plain
    return f"{plain[: _LONGEST - 33]}-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def write_file(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file of tensors and plain values at once; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_file(path: Path) -> dict[str, Any]:
    """What :func:`write_file` wrote, on the CPU.

    Raises
    ------
    StateError
        If it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise StateError(
            f"{path} cannot be read ({type(error).__name__}: {error}): remove it, and what it held is computed anew."
        ) from error


def check_same(
    path: Path, what: str, before: Mapping[str, Any], now: Mapping[str, Any], found: object = 1, known: object = 1
) -> None:
    """Raise a StateError unless both describe the same run, in the known format."""
    if found != known:
        raise StateError(
            f"{path} has format {found}, this version of scdlkit knows {known}; start over with resume=False."
        )
    different = [key for key in {**before, **now} if not _same(before.get(key), now.get(key))]
    if different:
        raise StateError(
            f"{path} is from another {what}: different {', '.join(different)}. Choose another folder, or start "
            "over with resume=False."
        )


def describe_run(
    strategy: Strategy, train: CellData, val: CellData, *, n_classes: int, seed: int, test: CellData | None = None
) -> dict[str, Any]:
    """What a fit depends on, as plain values: equal for the same call, different for any other."""
    return {
        "strategy": type(strategy).name,
        "config": json.loads(json.dumps(strategy.config.to_dict())),
        "number of classes": n_classes,
        "seed": seed,
        "training cells": _digest(train),
        "validation cells": _digest(val),
        **({} if test is None else {"test cells": _digest(test)}),
        # an embedding is only equal up to rounding where it is computed anew
        "embedding": [] if train.embedding is None else [float(train.embedding.mean()), float(train.embedding.std())],
    }


def _digest(cells: CellData) -> str:
    digest = hashlib.blake2b(np.asarray(cells.codes, dtype=np.int64).tobytes(), digest_size=16)
    if cells.tokens is not None:
        digest.update(cells.tokens.fingerprint().encode())
    if isinstance(cells.expression, ExpressionRows):
        digest.update(cells.expression.fingerprint().encode())
    elif cells.expression is not None:
        for part in (cells.expression.indptr, cells.expression.indices, cells.expression.data):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _same(first: Any, second: Any) -> bool:
    if all(isinstance(part, list) and part and all(type(x) is float for x in part) for part in (first, second)):
        return len(first) == len(second) and bool(np.allclose(first, second, rtol=1e-3, atol=1e-4))
    return bool(first == second)
