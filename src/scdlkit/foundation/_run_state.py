"""A run on disk: what it depends on, its frozen embedding, and every strategy that is finished.

``training/run.json`` says what run the folder belongs to, ``training/embedding.pt`` holds the embedding of its cells, and
each fit has a folder of its own with ``<strategy>.training.pt`` while a strategy trains (see ``_training_state.py``) and
``<strategy>.finished.pt`` afterwards. Every file is replaced at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scdlkit._settings import logger

from ._processes import from_main, is_main_process
from ._training_state import StateError, check_same, file_stem, read_file, write_file
from .known_cells import KnownCells
from .strategies import Strategy

_FORMAT = 1
RUN, EMBEDDING = "run.json", "embedding.pt"


class Finished(NamedTuple):
    """What a strategy learnt in a fit, and what it predicted."""

    state: dict[str, Tensor]  # of the strategy; empty where it is not kept
    metadata: dict[str, Any]
    history: list[dict[str, float]]
    fit_seconds: float
    peak_memory_mb: float
    probabilities: dict[str, np.ndarray]  # of "val" and "test", float32 [cells, classes]


class SavedEmbedding(NamedTuple):
    """Cells with their frozen embedding, and the seconds that it took."""

    cells: KnownCells
    seconds: float


class RunState:
    """The state of a run, which may be interrupted and go on.

    Of several processes that were launched together the first one reads and writes.

    Parameters
    ----------
    folder
        Where; made by :meth:`open`.
    resume
        Go on from what is there, instead of starting over.
    device
        Over which processes talk to each other.
    """

    def __init__(self, folder: Path, *, resume: bool, device: torch.device) -> None:
        self.folder, self.resume, self.device = folder, resume, device

    def open(self, run: Mapping[str, Any], strategies: Sequence[Strategy]) -> None:
        """Find out whether the folder belongs to this run, or empty it; before any training.

        Strategies, repeats and folds may be added to those of the run that was interrupted.

        Parameters
        ----------
        run
            What the run depends on besides the strategies, as plain values.
        strategies
            Whose configs must be those of the strategies of the same names before.

        Raises
        ------
        StateError
            If the folder holds the state of another run (``resume``), or something else.
        """
        from_main(lambda: self._open(json.loads(json.dumps(run)), strategies), self.device)

    def _open(self, run: dict[str, Any], strategies: Sequence[Strategy]) -> None:
        path = self.folder / RUN
        found = self.folder.exists() and any(self.folder.iterdir())
        if found and not path.is_file():
            raise StateError(
                f"{self.folder} holds files but no {RUN}, so it is not the state of a run; choose another output_dir."
            )
        configs = {strategy.name: _describe(strategy) for strategy in strategies}
        if found and self.resume:
            known = json.loads(path.read_text(encoding="utf-8"))
            check_same(path, "run", known.get("run", {}), run, known.get("format"), _FORMAT)
            for name in configs.keys() & known["strategies"].keys():
                check_same(path, repr(name), known["strategies"][name], configs[name])
            configs = known["strategies"] | configs
            logger.info("Goes on with the run in %s.", self.folder)
        elif self.resume:
            logger.info("No run to go on with in %s: starts from the beginning.", self.folder)
        elif found:
            logger.info("Starts over; the state of an earlier run in %s is removed.", self.folder)
            old = self.folder.with_name(f".{self.folder.name}-old")
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed right here
            self.folder.replace(old)
            shutil.rmtree(old)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{RUN}.part")
        unfinished.write_text(json.dumps({"format": _FORMAT, "run": run, "strategies": configs}, indent=1), "utf-8")
        unfinished.replace(path)

    def fit(self, *names: object, keep: bool = True) -> FitState:
        """The part of one fit, by what tells it from the others; ``keep`` as in :class:`FitState`."""
        return FitState(self.folder / "-".join(map(str, names)), self.device, keep=keep)

    def read_embedding(self) -> SavedEmbedding | None:
        """The frozen embedding, None if there is none yet."""
        path = self.folder / EMBEDDING

        def read() -> SavedEmbedding | None:
            if not path.is_file():
                return None
            content = read_file(path)
            keys, embedding = content["keys"].numpy().view(np.uint64), content["embedding"].numpy()
            return SavedEmbedding(KnownCells.none().with_embedding(keys, embedding), content["seconds"])

        return from_main(read, self.device)

    def write_embedding(self, keys: np.ndarray, embedding: np.ndarray, seconds: float) -> None:
        """Keep the frozen embedding float32 ``[cells, embsize]`` of cells with these hashes, and the time it took."""
        if is_main_process():
            # torch has few operations on uint64: the bits travel as int64
            content = {"keys": torch.from_numpy(keys.view(np.int64)), "embedding": torch.from_numpy(embedding)}
            write_file(self.folder / EMBEDDING, {**content, "seconds": seconds})


class FitState:
    """The strategies of one fit.

    Parameters
    ----------
    folder
        Of the fit; also where a trainer keeps its epochs.
    device
        Over which processes talk to each other.
    keep
        Keep what the strategies learnt, and not what they predicted alone.
    """

    def __init__(self, folder: Path, device: torch.device, *, keep: bool = True) -> None:
        self.folder, self.device, self.keep = folder, device, keep

    def read(self, name: str, run: Mapping[str, Any]) -> Finished | None:
        """A finished strategy, None if it is not.

        Raises
        ------
        StateError
            If it was finished with other cells, config, seed or classes.
        """
        path = self._path(name)

        def read() -> Finished | None:
            if not path.is_file():
                return None
            content = read_file(path)
            plain = json.loads(content["plain"])
            check_same(path, f"run of {name!r}", plain["run"], dict(run), plain["format"], _FORMAT)
            probabilities = {part: value.numpy() for part, value in content["probabilities"].items()}
            rest = {key: plain[key] for key in Finished._fields[1:-1]}
            return Finished(content["state"], probabilities=probabilities, **rest)

        return from_main(read, self.device)

    def write(self, name: str, run: Mapping[str, Any], finished: Finished) -> None:
        """Keep a finished strategy; the epochs of its training are no longer needed."""
        if not is_main_process():
            return
        plain = {key: getattr(finished, key) for key in Finished._fields[1:-1]}
        content = {
            "plain": json.dumps({**plain, "run": dict(run), "format": _FORMAT}),
            "state": dict(finished.state),
            "probabilities": {part: torch.from_numpy(value) for part, value in finished.probabilities.items()},
        }
        write_file(self._path(name), content)
        (self.folder / f"{file_stem(name)}.training.pt").unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{file_stem(name)}.finished.pt"


def _describe(strategy: Strategy) -> dict[str, Any]:
    return json.loads(json.dumps({"type": type(strategy).name, "config": strategy.config.to_dict()}))
