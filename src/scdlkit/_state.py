"""What a run depends on, so that an interrupted one goes on only as itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .foundation._run_state import RunState

if TYPE_CHECKING:
    import torch

    from ._prepared import PreparedCells
    from ._reader import CellReader
    from ._run_config import RunnerConfig
    from .foundation.strategies import CellData, Strategy

FOLDER = "training"  # of output_dir
# of the settings of a runner, those that its splits depend on; more repeats are no other run
_SPLIT = ("val_size", "test_size", "cv", "random_state")


def open_state(
    output_dir: str | os.PathLike[str] | None,
    *,
    resume: bool,
    config: RunnerConfig,
    prepared: PreparedCells,
    reader: CellReader,
    strategies: Sequence[Strategy],
    device: torch.device,
) -> RunState | None:
    """The state of this run under ``output_dir``, None without one.

    Raises
    ------
    ValueError
        If the folder holds another run and ``resume`` is asked for.
    """
    if output_dir is None:
        return None
    state = RunState(Path(output_dir) / FOLDER, resume=resume, device=device)
    settings = asdict(config)
    run: dict[str, Any] = {name: settings[name] for name in _SPLIT if name in settings}
    run |= {
        "checkpoint": reader.checkpoint.sha256,
        "tokens": {**asdict(reader.tokenizer), "n_draws": reader.n_draws},
        "cells": _digest(prepared.keys, prepared.names),
        "labels": _digest(prepared.codes, prepared.classes.astype(str)),
        "groups": "" if prepared.groups is None else _digest(prepared.groups.astype(str)),
    }
    state.open(run, strategies)
    return state


def load_cells(
    prepared: PreparedCells, reader: CellReader, strategies: Sequence[Strategy], state: RunState | None
) -> tuple[CellData, float]:
    """See :meth:`PreparedCells.load`; an embedding that the state holds is not computed again, nor is its time lost."""
    known = None if state is None else state.read_embedding()
    cells, seconds = prepared.load(reader, strategies, known=None if known is None else known.cells)
    if state is not None and cells.embedding is not None:
        if known is None:
            state.write_embedding(prepared.keys, cells.embedding, seconds)
        else:
            seconds = known.seconds
    return cells, seconds


def _digest(*parts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # a text may hold any sign, so its length goes in front
        content = part.tobytes() if part.dtype.kind in "iu" else "".join(f"{len(x)}:{x}" for x in part).encode()
        digest.update(f"{part.dtype.kind}{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()
