"""Rows and facts out of an expression matrix of any kind: dense, CSR, CSC, HDF5-backed, dask. Knows no AnnData.

Everything reads block by block, so memory stays flat, and hands out copies, so nothing a caller does reaches the original.
The one exception is CSC, which has no cheap rows: it is turned into CSR once. Facts about a matrix that is not in memory come
from rows all over it, :data:`SAMPLE_ROWS` in all: to read an atlas twice would cost as much as to embed it on a GPU.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from scdlkit._settings import logger

SAMPLE_ROWS = 4096
_SAMPLE_PLACES = 8
_DENSE_ELEMENTS = 16_000_000  # of a dense block, read at once: 64 MB in float32
_SPARSE_ROWS = 4096
_PIECE = 1 << 20
_CLASSIFIED_ROWS = 1024
_LARGEST = float(np.finfo(np.float32).max)


def is_dask(matrix: Any) -> bool:
    """Whether a matrix is a dask array, without importing dask."""
    return any(base.__module__.split(".")[0] == "dask" for base in type(matrix).__mro__)


def in_memory(matrix: Any) -> bool:
    """Whether reading the matrix costs next to nothing: neither on disk nor dask."""
    return sp.issparse(matrix) or isinstance(matrix, np.ndarray) or getattr(matrix, "in_memory", False)


def check_supported(matrix: Any, source: str) -> None:
    """Raise TypeError for what cannot be read as numbers in rows and columns."""
    if hasattr(matrix, "__cuda_array_interface__") or type(matrix).__module__.startswith("cupy"):
        raise TypeError(
            f"{source} is on the GPU ({type(matrix).__name__}); move it back first (adata.to_memory or .get())."
        )
    dtype, shape = getattr(matrix, "dtype", None), getattr(matrix, "shape", ())
    if dtype is None or len(shape) != 2 or not hasattr(matrix, "__getitem__"):
        raise TypeError(f"{source} must be a dense, CSR, CSC, backed or dask matrix, found {type(matrix).__name__}.")
    if np.dtype(dtype).kind not in "biuf":
        raise TypeError(f"{source} must hold integers or real numbers, found dtype {dtype}.")


def with_rows(matrix: Any) -> Any:
    """The matrix itself where rows can be read cheaply, else (CSC) a CSR copy; says so where the copy is of a file."""
    if getattr(matrix, "format", None) in (None, "csr") or is_dask(matrix):
        return matrix
    if not in_memory(matrix):
        logger.warning(
            "The matrix (%d cells × %d genes) is stored by genes (CSC), so all of it is read into memory. Store it by "
            "cells (CSR) to have it read piece by piece.",
            *matrix.shape,
        )
    return (matrix if sp.issparse(matrix) else matrix.to_memory()).tocsr()


def _materialise(block: Any) -> Any:
    block = block.compute() if is_dask(block) else block
    return block.tocsr() if sp.issparse(block) else np.asarray(block)


def _canonical(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    index_type = np.int32 if len(data) < np.iinfo(np.int32).max else np.int64
    arrays = (data.astype(np.float32), indices.astype(index_type), indptr.astype(index_type))
    result = sp.csr_matrix(arrays, shape=shape)
    result.sum_duplicates()
    result.eliminate_zeros()
    return result


def to_csr(block: Any) -> sp.csr_matrix:
    """Canonical float32 CSR copy: sorted indices, no duplicates, no stored zeros."""
    if sp.issparse(block):
        csr = block.tocsr()
        return _canonical(csr.data, csr.indices, csr.indptr, csr.shape)
    dense = np.ascontiguousarray(block, dtype=np.float32)
    filled = dense != 0
    per_row = np.count_nonzero(filled, axis=1)
    positions = np.flatnonzero(filled)
    columns = positions - np.repeat(np.arange(len(dense)) * dense.shape[1], per_row)
    indptr = np.concatenate([[0], np.cumsum(per_row)])
    return _canonical(dense.ravel()[positions], columns, indptr, dense.shape)


def _stack(parts: list[sp.csr_matrix]) -> sp.csr_matrix:
    return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


def read_rows(matrix: Any, start: int, stop: int) -> sp.csr_matrix:
    """Rows ``start`` to ``stop`` of a matrix with cheap rows (see :func:`with_rows`), as canonical CSR."""
    if sp.issparse(matrix):
        first, last = matrix.indptr[start], matrix.indptr[stop]
        indptr = matrix.indptr[start : stop + 1] - first
        # By hand, since scipy's own slicing does not support float16.
        return _canonical(matrix.data[first:last], matrix.indices[first:last], indptr, (stop - start, matrix.shape[1]))
    step = _block_rows(matrix)
    cuts = range(start, stop, step)
    return _stack([to_csr(_materialise(matrix[cut : min(cut + step, stop)])) for cut in cuts])


def read_index(matrix: Any, index: np.ndarray) -> sp.csr_matrix:
    """Rows at non-negative positions, in any order and with repeats, as canonical CSR."""
    if sp.issparse(matrix):
        first = matrix.indptr[index].astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(matrix.indptr[index + 1] - first)])
        taken = np.arange(indptr[-1]) + np.repeat(first - indptr[:-1], np.diff(indptr))
        return _canonical(matrix.data[taken], matrix.indices[taken], indptr, (len(index), matrix.shape[1]))
    if not len(index):
        return sp.csr_matrix((0, matrix.shape[1]), dtype=np.float32)
    unique, back = np.unique(index, return_inverse=True)  # HDF5 reads increasing positions only
    step = _block_rows(matrix)
    parts = [to_csr(_materialise(matrix[unique[cut : cut + step]])) for cut in range(0, len(unique), step)]
    return _stack(parts)[back]


def iterate_rows(
    matrix: Any, size: int, *, skip: Container[int] = frozenset()
) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Canonical CSR chunks of at most ``size`` rows, in order; a dask chunk is computed once.

    ``skip`` has the first rows of chunks that are left out; where chunks begin depends on the matrix and ``size`` alone.
    """
    for block in row_blocks(matrix, size):
        cuts = [slice(cut, min(cut + size, block.stop)) for cut in range(block.start, block.stop, size)]
        wanted = [cut for cut in cuts if cut.start not in skip]
        lazy = to_csr(_materialise(dask_rows(matrix, block))) if wanted and is_dask(matrix) else None
        for cut in wanted:
            if lazy is None:
                yield cut, read_rows(matrix, cut.start, cut.stop)
            else:
                whole = len(cuts) == 1
                yield cut, lazy if whole else lazy[cut.start - block.start : cut.stop - block.start]


def row_blocks(matrix: Any, size: int) -> list[slice]:
    """Rows that are read together: of a dask array as many chunks as make ``size`` rows, at least one; else all."""
    if not is_dask(matrix):
        return [slice(0, matrix.shape[0])] if matrix.shape[0] else []
    blocks: list[slice] = []
    start = 0
    for rows in matrix.chunks[0]:
        if blocks and start + rows - blocks[-1].start <= size:
            blocks[-1] = slice(blocks[-1].start, start + rows)
        elif rows:
            blocks.append(slice(start, start + rows))
        start += rows
    return blocks


def dask_rows(matrix: Any, rows: slice) -> Any:
    """The chunks of a dask array that make up ``rows``, one of :func:`row_blocks`; cheaper than slicing the array."""
    ends = np.cumsum(matrix.chunks[0])
    return matrix.blocks[
        int(np.searchsorted(ends, rows.start, side="right")) : int(np.searchsorted(ends, rows.stop)) + 1
    ]


def _block_rows(matrix: Any) -> int:
    if getattr(matrix, "format", None) is not None:
        return _SPARSE_ROWS
    return max(1, _DENSE_ELEMENTS // max(1, matrix.shape[1]))


@dataclass(frozen=True)
class Scan:
    """What one pass over the values found.

    ``first_bad`` is row, column and value of the first (by row, then column) value that is negative or not finite.
    ``n_rows`` is how many rows were looked at.
    """

    integers: bool
    largest: float
    negative: int = 0
    missing: int = 0
    infinite: int = 0
    first_bad: tuple[int, int, float] | None = None
    n_rows: int = 0

    @property
    def usable(self) -> bool:
        """Whether all values are finite and none is negative."""
        return self.first_bad is None


def _value_blocks(matrix: Any) -> Iterator[tuple[int, Any]]:
    """First row and values of each block; a sparse matrix in memory is one block of its stored values."""
    if sp.issparse(matrix):
        yield 0, matrix
        return
    n_rows = matrix.shape[0]
    if in_memory(matrix) or n_rows <= SAMPLE_ROWS:
        places = row_blocks(matrix, 1)
    else:
        places = _spread(n_rows, SAMPLE_ROWS)
    for rows in places:
        step = rows.stop - rows.start if is_dask(matrix) else _block_rows(matrix)
        for start in range(rows.start, rows.stop, step):
            yield start, _materialise(matrix[start : min(start + step, rows.stop)])


def read_spread(matrix: Any, n_wanted: int) -> sp.csr_matrix:
    """About ``n_wanted`` rows from all over a matrix, as canonical CSR."""
    return _stack([read_rows(matrix, rows.start, rows.stop) for rows in _spread(matrix.shape[0], n_wanted)])


def _spread(n_rows: int, n_wanted: int) -> list[slice]:
    """About ``n_wanted`` rows in a few places, the first and the last included."""
    at_once = n_wanted // _SAMPLE_PLACES
    starts = np.unique(np.linspace(0, max(0, n_rows - at_once), _SAMPLE_PLACES).astype(int)).tolist()
    return [slice(start, min(n_rows, start + at_once)) for start in starts]


def scan(matrix: Any) -> Scan:
    """Look at the values of a matrix with cheap rows once: the largest, whether all are integers, and every one that is no expression value.

    Of a matrix that is not in memory these are the values of a sample of its rows.
    """
    integers, largest, counts, first = True, 0.0, np.zeros(3, dtype=np.int64), None
    n_rows = 0
    for start, block in _value_blocks(matrix):
        n_rows += block.shape[0]
        values = block.data[: block.indptr[-1]] if sp.issparse(block) else block.reshape(-1)
        bad = False
        for cut in range(0, values.size, _PIECE):
            piece = values[cut : cut + _PIECE]
            low, high = float(piece.min()), float(piece.max())
            bad |= not (low >= 0 and high <= _LARGEST)  # NaN fails both
            largest = max(largest, high)
            if integers and piece.dtype.kind == "f":
                integers = bool((np.rint(piece) == piece).all())
        if bad:
            found, where = _bad_values(block, values)
            counts += found
            first = first or (where[0] + start, *where[1:])
    negative, missing, infinite = counts.tolist()
    return Scan(integers, largest, negative, missing, infinite, first, n_rows)


def _bad_values(block: Any, values: np.ndarray) -> tuple[np.ndarray, tuple[int, int, float]]:
    missing = np.isnan(values)
    with np.errstate(invalid="ignore"):
        infinite = np.abs(values) > _LARGEST
        negative = (values < 0) & ~infinite
    positions = np.flatnonzero(missing | infinite | negative)
    if not sp.issparse(block):
        rows, columns = np.divmod(positions, block.shape[1])
    else:
        rows = np.searchsorted(block.indptr, positions, side="right") - 1
        columns = block.indices[positions]
    first = np.lexsort((columns, rows))[0]
    counts = np.array([negative.sum(), missing.sum(), infinite.sum()])
    return counts, (int(rows[first]), int(columns[first]), float(values[positions[first]]))


def classify(matrix: Any, scanned: Scan, *, logged: bool = False) -> tuple[str, tuple[str, ...]]:
    """Say what usable values are.

    Parameters
    ----------
    matrix
        A matrix with cheap rows.
    scanned
        Its :func:`scan`, usable.
    logged
        Whether the data set says that it was log-transformed.

    Returns
    -------
    kind
        ``"counts"``: all integers. ``"normalised"``: on a linear scale; the sums of the cells agree, or values exceed what
        logarithms reach. ``"log1p"``: the rest.
    notes
        What is odd about the values.
    """
    if scanned.integers:
        binary = scanned.largest == 1 and matrix.shape[0] >= 20  # a few shallow cells may hold no 2
        return "counts", ("all values are 0 or 1 (binarised?), so that all genes of a cell tie",) if binary else ()
    sample = read_spread(matrix, _CLASSIFIED_ROWS)
    if _sums_agree(sample, sample.data):
        return "normalised", ()
    if scanned.largest > largest_logarithm(logged):
        return "normalised", ()
    if scanned.largest < 4:
        once = np.expm1(sample.data.astype(np.float64))
        twice = np.expm1(once)
        if _sums_agree(sample, twice) or (_near_integers(twice) and not _near_integers(once)):
            return "log1p", ("the values were log-transformed twice",)
    return "log1p", ()


def largest_logarithm(logged: bool) -> float:
    """What log1p values do not exceed; more is possible in other bases, where the data set says that it is logarithmic."""
    return 25.0 if logged else 15.0


def _sums_agree(sample: sp.csr_matrix, values: np.ndarray) -> bool:
    sums = np.bincount(
        np.repeat(np.arange(sample.shape[0]), np.diff(sample.indptr)), weights=values, minlength=sample.shape[0]
    )
    sums = sums[sums > 0]
    return len(sums) >= 3 and bool(sums.std() < 0.02 * sums.mean())


def _near_integers(values: np.ndarray) -> bool:
    return bool((np.abs(values - np.rint(values)) <= 1e-3 * np.maximum(1, values)).all())
