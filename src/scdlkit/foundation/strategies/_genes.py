"""Expression as the baselines on genes see it: log-normalised, genes found by name, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scdlkit._settings import logger

if TYPE_CHECKING:
    from ._cells import CellData

_TARGET_SUM = 1e4


class LogNormalised:
    """log1p of values that sum to 10,000 a cell, read piece by piece; log1p values are taken as they are.

    Genes of one name are one gene.

    Parameters
    ----------
    cells
        Cells with their expression.

    Attributes
    ----------
    names
        str ``[genes]``.

    Raises
    ------
    ValueError
        If ``cells.kind`` is unknown.
    """

    def __init__(self, cells: CellData) -> None:
        if cells.kind not in ("counts", "normalised", "log1p"):
            raise ValueError(f"kind must be 'counts', 'normalised' or 'log1p', found {cells.kind!r}.")
        self._expression, self._kind, self.n_cells = cells.expression, cells.kind, cells.n_cells
        self.names = np.asarray(cells.gene_names).astype(str).astype(object)
        self._merge: sp.csr_matrix | None = None
        unique, column = np.unique(self.names, return_inverse=True)
        if len(unique) < len(self.names):
            ones = np.ones(len(self.names), dtype=np.float32)
            self._merge = sp.csr_matrix((ones, (np.arange(len(ones)), column)))
            self.names = unique

    def pieces(self) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Positions of some cells and their values, float32; every cell once, a cell's values wherever it is."""
        if sp.issparse(self._expression):
            rows = sp.csr_matrix(self._expression, dtype=np.float32, copy=True)
            yield np.arange(self.n_cells), self._transformed(rows)
        elif self._expression is not None:
            for positions, rows in self._expression.pieces():
                yield positions, self._transformed(rows)

    def matrix(self, pick: Callable[[sp.csr_matrix], sp.csr_matrix] = lambda rows: rows) -> sp.csr_matrix:
        """All cells in their order, of each piece what ``pick`` makes of it: some of the genes, say."""
        positions, parts = [], []
        for at, rows in self.pieces():
            positions.append(at)
            parts.append(pick(rows))
        if not parts:
            return pick(sp.csr_matrix((0, len(self.names)), dtype=np.float32))
        order = np.concatenate(positions)
        whole = parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")
        if (order[1:] > order[:-1]).all():
            return whole
        del parts
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return whole[back]

    def _transformed(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        if self._kind == "log1p":
            if self._merge is None:
                return matrix
            matrix.data = np.expm1(matrix.data)
        if self._merge is not None:
            matrix = (matrix @ self._merge).tocsr()
        if self._kind != "log1p":
            total = np.asarray(matrix.sum(1)).ravel()
            total[total == 0] = 1  # a cell without counts stays all zero
            matrix.data /= np.repeat(total / _TARGET_SUM, np.diff(matrix.indptr)).astype(np.float32)
        np.log1p(matrix.data, out=matrix.data)
        return matrix


def standard_deviation(matrix: sp.csr_matrix) -> np.ndarray:
    """Standard deviation of each column, 1 where it is zero up to rounding."""
    wide = matrix.astype(np.float64)
    mean = np.asarray(wide.mean(0)).ravel()
    square = np.asarray(wide.multiply(wide).mean(0)).ravel()
    variance = square - mean**2
    return np.where(variance > 1e-9 * square, np.sqrt(np.maximum(variance, 0)), 1.0)


def expression_of(
    cells: CellData, genes: np.ndarray, strategy: str, *, absent: str = "count as not expressed"
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Log-normalised values of ``genes`` ``[cells, genes]``, and which of the genes the data has.

    Parameters
    ----------
    cells
        Cells with their expression, genes in any order.
    genes
        Names that a strategy knows.
    strategy
        Its name, for the messages.
    absent
        What happens to genes that the data does not have, for the warning; their column is 0.

    Raises
    ------
    ValueError
        If the data has none of the genes.
    """
    values = LogNormalised(cells)
    column_of = {name: column for column, name in enumerate(values.names)}
    columns = np.array([column_of.get(name, -1) for name in genes])
    found = columns >= 0
    if not found.any():
        raise ValueError(f"None of the {len(genes)} genes of {strategy!r} is in the data; check the gene names.")
    if not found.all():
        logger.warning(
            "%s: %d of its %d genes (%.0f %%) are not in the data and %s.",
            strategy,
            (~found).sum(),
            len(found),
            100 * (~found).mean(),
            absent,
        )
    ones = np.ones(found.sum(), dtype=np.float32)
    placed = sp.csr_matrix((ones, (columns[found], np.flatnonzero(found))), shape=(len(values.names), len(columns)))
    return values.matrix(lambda rows: (rows @ placed).tocsr()), found
