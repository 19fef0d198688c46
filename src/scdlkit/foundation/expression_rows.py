"""Some cells of an expression matrix, read piece by piece whenever they are needed, so that no copy of them is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from . import matrices
from .expression import CHUNK_CELLS, Expression


class ExpressionRows:
    """The cells at some rows of an expression matrix; a subset of them is as cheap as the numbers of its rows.

    Parameters
    ----------
    expression
        The matrix, in memory or not.
    rows
        int ``[cells]``, positions in it, in any order.

    Example
    -------
    >>> train = ExpressionRows(expression, prepared.rows)[split.train]
    >>> sums = sum(np.asarray(rows.sum(0)) for _, rows in train.pieces())
    """

    def __init__(self, expression: Expression, rows: np.ndarray, *, hashes: _RowHashes | None = None) -> None:
        self._expression, self._rows = expression, np.asarray(rows, dtype=np.int64)
        self._hashes = _RowHashes(expression) if hashes is None else hashes

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self._rows), self._expression.n_genes

    def __getitem__(self, index: Any) -> ExpressionRows:
        """The cells at ``index`` (slice, integers or mask), in that order; reads nothing."""
        return ExpressionRows(self._expression, np.atleast_1d(self._rows[index]), hashes=self._hashes)

    def pieces(self) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Read the cells once.

        Yields
        ------
        Positions of some of the cells, and their rows: canonical float32 CSR over all genes, a copy. They come in the
        order of the matrix: a file is read forwards, and each part of it once.
        """
        order = np.argsort(self._rows, kind="stable")
        wanted = self._rows[order]
        for cells, rows in self._expression.chunks(CHUNK_CELLS, skip=self._chunks_without(wanted)):
            low, high = np.searchsorted(wanted, [cells.start, cells.stop])
            yield order[low:high], rows[wanted[low:high] - cells.start]

    def fingerprint(self) -> str:
        """Hex digest of the content: equal rows in equal order, equal digest, however they are stored."""
        return hashlib.blake2b(self._hashes.of_all[self._rows].tobytes(), digest_size=16).hexdigest()

    def _chunks_without(self, wanted: np.ndarray) -> set[int]:
        blocks = matrices.row_blocks(self._expression.matrix, CHUNK_CELLS)
        cuts = [
            (start, min(start + CHUNK_CELLS, block.stop))
            for block in blocks
            for start in range(block.start, block.stop, CHUNK_CELLS)
        ]
        return {start for start, stop in cuts if np.equal(*np.searchsorted(wanted, [start, stop]))}


class _RowHashes:
    """Digest of every row of an expression matrix, computed when it is first asked for."""

    def __init__(self, expression: Expression) -> None:
        self._expression = expression

    @cached_property
    def of_all(self) -> np.ndarray:
        """uint8 ``[cells, 16]``."""
        result = np.empty((self._expression.n_cells, 16), dtype=np.uint8)
        for cells, rows in self._expression.chunks():
            indices, data = rows.indices.astype(np.int32), rows.data
            for row, (low, high) in enumerate(zip(rows.indptr[:-1], rows.indptr[1:], strict=True), start=cells.start):
                digest = hashlib.blake2b(indices[low:high].data, digest_size=16)
                digest.update(data[low:high].data)
                result[row] = np.frombuffer(digest.digest(), dtype=np.uint8)
        return result
