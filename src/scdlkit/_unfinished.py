"""Results of pieces of the cells, kept in a folder beside the target until all are there: what is done survives a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ._settings import logger
from ._stream import Result

_RUN = "run.json"
_PART = re.compile(r"(\d+)-(\d+)\.npz")


class Unfinished:
    """A folder with one file a piece, each there complete or not at all.

    Parameters
    ----------
    folder
        Is there, and in use by nobody else.
    run
        Plain values that say which results these are: model, cells, settings.
    resume
        Take up what an earlier run with the same ``run`` left; there may be none.

    Raises
    ------
    ValueError
        If there are results of an earlier run and ``resume`` is not asked for, or they are of another run.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self._files = {
            int(match[1]): (slice(int(match[1]), int(match[2])), path)
            for path in self.folder.iterdir()
            if (match := _PART.fullmatch(path.name))
        }
        description = self.folder / _RUN
        if not self._files:  # whatever was begun here came to nothing
            _write(description, json.dumps(run, indent=1, ensure_ascii=False).encode())
            return
        if not resume:
            raise ValueError(
                f"{self.folder} holds results of a run that did not end: go on with it (resume=True, --resume), or "
                "remove the folder."
            )
        earlier = json.loads(description.read_text(encoding="utf-8"))
        if differing := sorted(name for name in {*run, *earlier} if run.get(name) != earlier.get(name)):
            raise ValueError(
                f"{self.folder} holds results of another run (other {', '.join(differing)}): repeat that one, or "
                "remove the folder."
            )
        logger.info("Goes on where an earlier run ended: %d of its pieces are there.", len(self._files))

    @property
    def done(self) -> frozenset[int]:
        """First cells of the pieces that are there."""
        return frozenset(self._files)

    @property
    def n_cells(self) -> int:
        """Cells whose results are there."""
        return sum(cells.stop - cells.start for cells, _ in self._files.values())

    def put(self, cells: slice, result: Result) -> None:
        """Keep the result of a piece."""
        path = self.folder / f"{cells.start:012d}-{cells.stop:012d}.npz"
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez(file, **result)  # type: ignore[arg-type]
            _to_disk(file.fileno(), file.flush)
        unfinished.replace(path)
        self._files[cells.start] = (cells, path)

    def parts(self, *names: str) -> Iterator[tuple[slice, Result]]:
        """What was put, in the order of the cells.

        Parameters
        ----------
        names
            Which arrays; all by default.

        Raises
        ------
        ValueError
            If a file is damaged.
        """
        for cells, path in sorted(self._files.values(), key=lambda entry: entry[0].start):
            try:
                with path.open("rb") as file, np.load(file) as content:
                    yield cells, {name: content[name] for name in names or content.files}
            except (BadZipFile, KeyError, OSError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}): remove it, and run again with resume.") from error

    def rows(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """One of the arrays, in the order of the cells; see :meth:`parts`."""
        return ((cells, part[name]) for cells, part in self.parts(name))

    def remove(self) -> None:
        """Remove the folder; nothing is lost if this fails."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(content)
        _to_disk(file.fileno(), file.flush)
    unfinished.replace(path)


def _to_disk(descriptor: int, flush: Any) -> None:
    """A rename may reach the disk before the content does; not so after this."""
    flush()
    os.fsync(descriptor)
