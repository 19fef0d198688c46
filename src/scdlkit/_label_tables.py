"""Tables of one row a cell as files: parquet and csv."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._cell_files import appearing

if TYPE_CHECKING:
    from pandas import DataFrame

TABLES = (".parquet", ".csv")
_GROUP_ROWS = 65_536


def write_table(
    target: Path,
    table: DataFrame,
    *,
    pieces: Iterator[tuple[slice, dict[str, np.ndarray]]] | None = None,
    params: Mapping[str, Any],
) -> None:
    """Write a table, which appears complete or not at all; a file that is there is replaced.

    Parameters
    ----------
    target
        Ends in ``.parquet`` or ``.csv``.
    table
        One row a cell, names of the cells in the index.
    pieces
        Arrays float32 ``[cells, width]`` of consecutive cells, by the name of their column: lists of a fixed length in
        parquet, not possible in csv.
    params
        Plain values that are kept with a parquet file, as JSON under the key ``scdlkit`` of its metadata.
    """
    with appearing(target) as unfinished:
        if target.suffix == ".csv":
            table.to_csv(unfinished, index_label="cell")
        else:
            _write_parquet(unfinished, table, pieces, params)


def _write_parquet(
    path: Path,
    table: DataFrame,
    pieces: Iterator[tuple[slice, dict[str, np.ndarray]]] | None,
    params: Mapping[str, Any],
) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    if pieces is None:
        starts = range(0, max(1, len(table)), _GROUP_ROWS)
        pieces = ((slice(start, start + _GROUP_ROWS), {}) for start in starts)
    writer = None
    try:
        for cells, arrays in pieces:
            rows = pa.Table.from_pandas(table.iloc[cells])
            for name, values in arrays.items():
                flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
                rows = rows.append_column(name, pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
            rows = rows.replace_schema_metadata({**(rows.schema.metadata or {}), "scdlkit": json.dumps(params)})
            writer = writer or ParquetWriter(path, rows.schema)
            writer.write_table(rows)
    finally:
        if writer is not None:
            writer.close()
