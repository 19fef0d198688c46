"""From cells in a file to results in a file: what predicting and embedding have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import scipy.sparse as sp

from scdlkit._cell_files import (
    FORMATS,
    appearing,
    check_cells_path,
    check_replaceable,
    columns_of,
    copy_with_results,
    open_cells,
)
from scdlkit._cluster import check_client
from scdlkit._keys import ResultKeys
from scdlkit._label_tables import write_table
from scdlkit._optional import require_parquet
from scdlkit._stream import Result, chunk_cells
from scdlkit._unfinished import Unfinished

if TYPE_CHECKING:
    import numpy as np
    from anndata import AnnData
    from distributed import Client

    from scdlkit.foundation.expression import Expression


class FileRun:
    """One run over the cells of a file.

    Parameters
    ----------
    cells
        Path, or an AnnData.
    out
        Path.
    others
        Endings that ``out`` may have besides those of files of cells.
    client
        Of a dask cluster, or None or False.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError, ImportError
        If cells or ``out`` cannot be used; nothing is read or written before.
    RuntimeError
        If several processes were launched together.
    """

    def __init__(
        self,
        cells: str | os.PathLike[str] | AnnData,
        out: str | os.PathLike[str],
        *,
        others: tuple[str, ...],
        client: Client | Literal[False] | None,
    ) -> None:
        from anndata import AnnData

        from scdlkit.foundation._processes import launched_processes

        if launched_processes() > 1:
            raise RuntimeError(
                "Several processes were launched together (WORLD_SIZE); files are written by one: start one, and pass "
                "client= to share the work on a dask cluster."
            )
        self.target = Path(out)
        self.cells = cells if isinstance(cells, AnnData) else None
        self.path: Path | None = None
        if self.cells is None:
            if not isinstance(cells, str | os.PathLike):
                raise TypeError(f"cells must be a path or an AnnData, found {type(cells).__name__}.")
            self.path = Path(cells)
            check_cells_path(self.path)
        if self.target.suffix not in (*others, *FORMATS):
            raise ValueError(f"out must end in {', '.join((*others, *FORMATS))}, found {self.target}.")
        if self.writes_cells and (self.path is None or self.path.suffix != self.target.suffix):
            given = "an AnnData" if self.path is None else f"a {self.path.suffix} file"
            raise ValueError(
                f"out={str(self.target)!r} would be a copy of the cells with results, but cells is {given}: give a "
                f"{self.target.suffix} file, or let out end in {' or '.join(others)}."
            )
        check_replaceable(self.target)
        if self.target.suffix == ".parquet":
            require_parquet()
        if client:
            check_client(client)

    @property
    def writes_cells(self) -> bool:
        """Whether ``out`` is a file of cells."""
        return self.target.suffix in FORMATS

    def check_columns(self, keys: ResultKeys, inputs: Iterable[str | None]) -> None:
        """Raise a ValueError if columns of ``inputs`` would be overwritten."""
        if self.writes_cells and self.path is not None:
            for name in set(inputs) & set(keys.columns) & set(columns_of(self.path)):
                raise ValueError(
                    f"The result would overwrite .obs[{name!r}], which holds the labels or groups it is learnt from; "
                    "choose another key_added."
                )

    @contextmanager
    def opened(self) -> Iterator[AnnData]:
        """The cells."""
        if self.path is None:
            yield self.cells
        else:
            with open_cells(self.path) as adata:
                yield adata

    def readable(self, expression: Expression) -> Path | None:
        """The file, if others can read the rows of the matrix out of it."""
        return None if sp.issparse(expression.matrix) else self.path

    @contextmanager
    def store(self, expression: Expression, what: Mapping[str, Any], *, resume: bool) -> Iterator[Unfinished]:
        """Where the results of the pieces are kept until all are there; of one process at a time."""
        from scdlkit.foundation._lock import exclusive

        run = {
            **what,
            "cells": expression.fingerprint(chunk_cells()),
            "n_cells": expression.n_cells,
            "version": version("scdlkit"),
        }
        folder = self.target.with_name(f".{self.target.name}-unfinished")
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(folder / "lock", f"writing {self.target}", wait=False))
            except BlockingIOError as error:
                raise ValueError(
                    f"Another process is writing {self.target}, and has its pieces in {folder}: wait until it has ended, "
                    "or give another out."
                ) from error
            yield Unfinished(folder, run, resume=resume)

    def collect(self, store: Unfinished, parts: Iterable[tuple[slice, Result]], n_cells: int) -> None:
        """Keep the results of all pieces as they come."""
        for cells, result in parts:
            store.put(cells, result)
        if store.n_cells != n_cells:
            raise RuntimeError(f"{store.folder} has results of {store.n_cells} of {n_cells} cells.")

    def write(
        self,
        store: Unfinished,
        expression: Expression,
        *,
        columns: Mapping[str, Any],
        arrays: Mapping[str, str],
        uns: Mapping[str, Any],
        stale: Iterable[str] = (),
    ) -> None:
        """Put the results together.

        Parameters
        ----------
        store
            With all results.
        expression
            Names and number of the cells.
        columns
            Name → values of each cell.
        arrays
            Name in the target → name in ``store``, of arrays float32 ``[cells, width]``.
        uns
            What goes into ``.uns``, or, without the tables in it, into the metadata of a parquet file.
        stale
            Names in ``.uns`` that go.
        """
        if self.path is not None and self.writes_cells:
            pieces = {name: store.rows(kept) for name, kept in arrays.items()}
            copy_with_results(self.path, self.target, columns=columns, arrays=pieces, uns=uns, stale=stale)
        elif self.target.suffix == ".npy":
            ((_, kept),) = arrays.items()
            _write_npy(self.target, store.rows(kept), expression.n_cells)
        else:
            import pandas as pd

            names = pd.Index(list(columns), dtype=object)
            table = pd.DataFrame(dict(columns), index=expression.names, columns=names, copy=False)
            named = (
                (cells, {name: part[kept] for name, kept in arrays.items()})
                for cells, part in store.parts(*arrays.values())
            )
            params = {key: content["params"] for key, content in uns.items()}
            write_table(self.target, table, pieces=named if arrays else None, params=params)


def _write_npy(target: Path, pieces: Iterator[tuple[slice, np.ndarray]], n_cells: int) -> None:
    import numpy as np

    # written one after another: what is written through a memory map stays in memory for a while
    with appearing(target) as unfinished, unfinished.open("wb") as file:
        for cells, rows in pieces:
            if cells.start == 0:
                header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (n_cells, rows.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(rows).data)
