"""Expression as the baselines on genes see it: log-normalised, genes found by name, the same for all of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scdlkit._settings import logger

if TYPE_CHECKING:
    from ._cells import CellData

_TARGET_SUM = 1e4


def log_normalised(cells: CellData) -> tuple[sp.csr_matrix, np.ndarray]:
    """log1p of values that sum to 10,000 a cell, and gene names; log1p values are taken as they are."""
    import scanpy as sc

    if cells.kind not in ("counts", "normalised", "log1p"):
        raise ValueError(f"kind must be 'counts', 'normalised' or 'log1p', found {cells.kind!r}.")
    matrix = sp.csr_matrix(cells.expression, dtype=np.float32, copy=True)
    names = np.asarray(cells.gene_names).astype(str).astype(object)
    unique, column = np.unique(names, return_inverse=True)
    duplicated = len(unique) < len(names)
    if cells.kind == "log1p" and not duplicated:
        return matrix, names
    if cells.kind == "log1p":
        matrix.data = np.expm1(matrix.data)
    if duplicated:  # genes of one name are one gene
        ones = np.ones(len(names), dtype=np.float32)
        matrix = (matrix @ sp.csr_matrix((ones, (np.arange(len(names)), column)))).tocsr()
        names = unique
    if cells.kind != "log1p":
        adata = sc.AnnData(matrix)
        with warnings.catch_warnings():  # a cell without counts stays all zero, which is right here
            warnings.filterwarnings("ignore", message="Some cells have zero counts")
            sc.pp.normalize_total(adata, target_sum=_TARGET_SUM)
        matrix = adata.X
    return sc.pp.log1p(matrix), names


def variable_genes(matrix: sp.csr_matrix, n_top_genes: int) -> np.ndarray:
    """Sorted columns of the most variable genes, none of them constant."""
    import scanpy as sc

    varies = np.flatnonzero(standard_deviation(matrix, constant=0.0) > 0)
    if len(varies) == 0:
        raise ValueError(f"All {matrix.shape[1]} genes are constant over the training cells; nothing to learn from.")
    if len(varies) <= n_top_genes:
        return varies
    adata = sc.AnnData(matrix[:, varies])
    adata.uns["log1p"] = {"base": None}
    table = sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes, inplace=False)
    return varies[np.flatnonzero(table["highly_variable"].to_numpy())]


def standard_deviation(matrix: sp.csr_matrix, constant: float = 1.0) -> np.ndarray:
    """Standard deviation of each column, ``constant`` where it is zero up to rounding."""
    wide = matrix.astype(np.float64)
    mean = np.asarray(wide.mean(0)).ravel()
    square = np.asarray(wide.multiply(wide).mean(0)).ravel()
    variance = square - mean**2
    return np.where(variance > 1e-9 * square, np.sqrt(np.maximum(variance, 0)), constant)


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
    matrix, names = log_normalised(cells)
    column_of = {name: column for column, name in enumerate(names)}
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
    ones = np.ones(found.sum(), dtype=matrix.dtype)
    placed = sp.csr_matrix((ones, (columns[found], np.flatnonzero(found))), shape=(matrix.shape[1], len(columns)))
    return (matrix @ placed).tocsr(), found
