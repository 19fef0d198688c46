"""Training on disk: after every epoch all that it needs to go on exactly, in one file that is replaced at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .strategies import CellData, GradientStrategy

_FORMAT = 1


@dataclass
class Progress:
    """How far a training has come, but for its tensors."""

    epoch: int = 0
    step: int = 0
    waited: int = 0  # epochs since the best one
    accumulation: int = 1
    best: tuple[float, float] | None = None  # validation macro-F1 and negative loss
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


class Saved(NamedTuple):
    """A training as it was saved."""

    progress: Progress
    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


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
        # a name may be the user's own, with any signs in it
        plain = "".join(sign if sign.isalnum() or sign in "-_" else f"%{ord(sign):02X}" for sign in name)
        self.path = Path(folder) / f"{plain}.training.pt"

    def write(self, saved: Saved) -> None:
        """Replace the file; a crash leaves the old or the new one, never half of one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        plain = {"format": _FORMAT, "run": self.run, "progress": asdict(saved.progress)}
        content = {**saved._asdict(), "progress": json.dumps(plain)}
        unfinished = self.path.with_name(f".{self.path.name}.part")
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)

    def read(self) -> Saved | None:
        """What was saved, None if nothing was.

        Raises
        ------
        ValueError
            If the file is of another run: other cells, config, seed or classes.
        """
        if not self.path.is_file():
            return None
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        plain = json.loads(content["progress"])
        if plain["format"] != _FORMAT:
            raise ValueError(
                f"{self.path} has format {plain['format']}, this version of scdlkit reads {_FORMAT}; train with "
                "resume=False."
            )
        run = plain["run"]
        different = [key for key in {**run, **self.run} if not _same(run.get(key), self.run.get(key))]
        if different:
            raise ValueError(
                f"{self.path} is from another run of {self.name!r}, with a different {', '.join(different)}. Choose "
                "another state_dir, or start over with resume=False."
            )
        progress = Progress(**plain["progress"])
        progress.best = None if progress.best is None else (progress.best[0], progress.best[1])
        return Saved(progress, *(content[part] for part in Saved._fields[1:]))


def describe_run(
    strategy: GradientStrategy, train: CellData, val: CellData, *, n_classes: int, seed: int
) -> dict[str, Any]:
    """What a training depends on, as plain values: equal for the same call, different for any other."""
    return {
        "strategy": type(strategy).name,
        "config": json.loads(json.dumps(strategy.config.to_dict())),
        "number of classes": n_classes,
        "seed": seed,
        "training cells": _digest(train),
        "validation cells": _digest(val),
        # an embedding is only equal up to rounding where it is computed anew
        "embedding": [] if train.embedding is None else [float(train.embedding.mean()), float(train.embedding.std())],
    }


def _digest(cells: CellData) -> str:
    digest = hashlib.blake2b(digest_size=16)
    parts = [np.asarray(cells.codes, dtype=np.int64)]
    if cells.tokens is not None:
        parts += [cells.tokens.indptr, cells.tokens.gene_ids, cells.tokens.bins]
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second) == 2:
        return bool(np.allclose(first, second, rtol=1e-3, atol=1e-4))
    return bool(first == second)
