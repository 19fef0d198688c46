"""Work through the cells of a matrix piece by piece: memory stays at a few pieces, however many cells there are."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ._settings import settings
from .foundation._processes import is_main_process
from .foundation.expression import CHUNK_CELLS, Expression

Result = dict[str, np.ndarray]  # arrays of one row a cell
T = TypeVar("T")


class Work(Protocol):
    """What is made of a piece of a matrix, in two steps."""

    def prepare(self, piece: Expression, /) -> Any:
        """The first step, which may run in a thread while the piece before is in its second."""

    def __call__(self, piece: Expression, prepared: Any, /) -> Result:
        """The second step."""


def work_through(
    expression: Expression,
    work: Work,
    *,
    skip: Container[int] = frozenset(),
    progress: bool | None = None,
) -> Iterator[tuple[slice, Result]]:
    """What ``work`` makes of each piece of an expression matrix, in order.

    The next piece is read and prepared while one is worked on.

    Parameters
    ----------
    expression
        The matrix.
    work
        Done with one piece after another.
    skip
        First cells of pieces to leave out.
    progress
        Show a bar where there is more than one piece; the setting by default.
    """
    size = chunk_cells()
    show = (settings.progress if progress is None else progress) and expression.n_cells > size and is_main_process()
    with tqdm(total=expression.n_cells, unit="cell", disable=not show, leave=False) as bar:
        ready = ((cells, piece, work.prepare(piece)) for cells, piece in expression.pieces(size, skip=skip))
        for cells, piece, prepared in _read_ahead(ready):
            yield cells, work(piece, prepared)
            bar.update(cells.stop - bar.n)


def chunk_cells() -> int:
    """Most cells of a piece."""
    return CHUNK_CELLS


def put_together(parts: Iterable[tuple[slice, Result]], n_cells: int) -> Result:
    """The whole of what was made of the pieces; they may come in any order."""
    whole: Result = {}
    for cells, part in parts:
        for name, rows in part.items():
            if name not in whole:
                whole[name] = np.empty((n_cells, *rows.shape[1:]), rows.dtype)
            whole[name][cells] = rows
    return whole


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each produced, in a thread, while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
