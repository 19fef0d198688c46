"""Work on pieces of a matrix on the workers of a dask cluster; each of them loads the model once."""

from __future__ import annotations

import sys
from ast import literal_eval
from collections.abc import Container, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import pandas as pd
from tqdm.auto import tqdm

from ._cell_files import matrix_on_disk
from ._optional import require_dask
from ._settings import logger, settings
from ._stream import Result, Work, chunk_cells
from .foundation import matrices
from .foundation.expression import Expression

if TYPE_CHECKING:
    from distributed import Client, Future

    from .foundation.matrices import Scan

_AHEAD = 2  # pieces a worker has: one at work, one on its way
_one_at_a_time = Lock()  # models are no place for two threads
_ANY_SIZE = {"distributed.admin.large-graph-warning-threshold": "1 TB"}


class Recipe(Hashable, Protocol):
    """What a worker needs to set up the work by itself: small, hashable, sent along with every piece."""

    def build(self) -> Work:
        """Load the model."""


@dataclass(frozen=True)
class FileRows:
    """Rows of a matrix in a file that the workers can open.

    Parameters
    ----------
    path, name
        The file, and the matrix in it (``"X"``, ``"raw/X"``, ``"layers/counts"``).
    cells
        First row, and the one behind the last.
    """

    path: Path
    name: str
    cells: tuple[int, int]


class _Answer(NamedTuple):
    found: Scan
    parts: list[tuple[slice, Result]]


def spread_out(
    expression: Expression,
    recipe: Recipe,
    client: Client,
    *,
    path: Path | None = None,
    skip: Container[int] = frozenset(),
    progress: bool | None = None,
) -> Iterator[tuple[slice, Result]]:
    """What :func:`scdlkit._stream.work_through` yields, computed by the workers of a cluster, in any order.

    Dask arrays are computed by the workers, files read by them; rows of any other matrix are read here and sent. When a
    worker dies, others do its work.

    Parameters
    ----------
    expression
        The matrix.
    recipe
        What to do with a piece.
    client
        Of the cluster.
    path
        The file that the matrix is in, where the workers can open it.
    skip, progress
        As in :func:`scdlkit._stream.work_through`.

    Raises
    ------
    TypeError
        If ``client`` is no client that blocks.
    RuntimeError
        If workers die again and again on the same cells.
    """
    check_client(client)
    from distributed import KilledWorker, as_completed

    head = replace(expression, matrix=None, names=pd.RangeIndex(0), check=None)
    tasks = _tasks(expression, path, skip)
    futures = as_completed(loop=client.loop)
    running: dict[Future, slice] = {}
    show = (settings.progress if progress is None else progress) and expression.n_cells > chunk_cells()

    def fill() -> None:
        while len(running) < _AHEAD * max(1, len(client.nthreads())) and (task := next(tasks, None)) is not None:
            cells, rows = task
            if matrices.is_dask(rows):
                rows = client.compute(rows)
            future = client.submit(_work_on, recipe, head, rows, chunk_cells(), pure=False)
            running[future] = cells
            futures.add(future)

    try:
        with tqdm(total=expression.n_cells, unit="cell", disable=not show, leave=False) as bar, _no_size_warning():
            fill()
            for future in futures:
                cells = running.pop(future)
                try:
                    answer: _Answer = future.result()
                except KilledWorker as error:
                    raise RuntimeError(
                        f"Workers died several times on cells {cells.start} to {cells.stop - 1}; have they enough "
                        "memory? What is done is kept where a file is written: resume=True goes on."
                    ) from error
                fill()
                if expression.check is not None:
                    expression.check.judge(range(cells.start, cells.stop), answer.found)
                for part, result in answer.parts:
                    whole = slice(cells.start + part.start, cells.start + part.stop)
                    if whole.start not in skip:
                        yield whole, result
                bar.update(cells.stop - cells.start)
    finally:
        client.cancel(list(running))


def check_client(client: Any) -> None:
    """Raise a TypeError unless this is a client that waits for results, an ImportError without dask."""
    require_dask()
    from distributed import Client

    if not isinstance(client, Client) or client.asynchronous:
        found = "an asynchronous one" if isinstance(client, Client) else type(client).__name__
        raise TypeError(f"client must be a dask.distributed.Client(asynchronous=False), found {found}.")


def chosen_client(client: Client | Literal[False] | None, expression: Expression) -> Client | None:
    """The client that was given; for None the one in force, if the matrix is a dask array; for False none."""
    if client is None:
        return _client_in_force(expression)
    return client or None


def _client_in_force(expression: Expression) -> Client | None:
    """The default client of the process, if the matrix is a dask array, which dask would compute there; else None."""
    distributed = sys.modules.get("distributed")  # without it there is no client
    if distributed is None or not matrices.is_dask(expression.matrix):
        return None
    try:
        client: Client = distributed.default_client()
    except ValueError:
        return None
    if client.asynchronous:
        return None
    logger.info("The matrix is a dask array, so the %d workers of %s share the work.", len(client.nthreads()), client)
    return client


def _tasks(expression: Expression, path: Path | None, skip: Container[int]) -> Iterator[tuple[slice, Any]]:
    """Cells, and what their rows are made from on a worker: a file, a dask array, or the rows themselves."""
    matrix, size = expression.matrix, chunk_cells()
    if path is None and not matrices.is_dask(matrix):
        yield from ((cells, piece.matrix) for cells, piece in expression.pieces(size, skip=skip))
        return
    for block in matrices.row_blocks(matrix, size):
        cuts = [slice(start, min(start + size, block.stop)) for start in range(block.start, block.stop, size)]
        wanted = [cut for cut in cuts if cut.start not in skip]
        if path is not None:
            name = _name_in_file(expression.source)
            yield from ((cut, FileRows(path.absolute(), name, (cut.start, cut.stop))) for cut in wanted)
        elif wanted:
            yield block, matrices.dask_rows(matrix, block)


def _name_in_file(source: str) -> str:
    if source.startswith("layers["):
        return f"layers/{literal_eval(source.removeprefix('layers[')[:-1])}"
    return source.replace(".", "/")


def _work_on(recipe: Recipe, head: Expression, rows: Any, size: int) -> _Answer:
    """On a worker: read, check, work."""
    if isinstance(rows, FileRows):
        with matrix_on_disk(rows.path, rows.name) as matrix:
            csr = matrices.read_rows(matrix, *rows.cells)
    else:
        csr = matrices.to_csr(rows)
    found = matrices.scan(csr)
    if not found.usable:
        return _Answer(found, [])
    with _one_at_a_time:
        work = _built(recipe)
        cuts = [slice(start, min(start + size, csr.shape[0])) for start in range(0, csr.shape[0], size)]
        parts = []
        for cut in cuts:
            piece = replace(head, matrix=csr[cut])
            parts.append((cut, work(piece, work.prepare(piece))))
    return _Answer(found, parts)


@lru_cache(maxsize=2)
def _built(recipe: Recipe) -> Work:
    return recipe.build()


def _no_size_warning() -> Any:
    """Rows may travel with their task: a scheduler that still has them can give them to another worker."""
    import dask

    return dask.config.set(_ANY_SIZE)
