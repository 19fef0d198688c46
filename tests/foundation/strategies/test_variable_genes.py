from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData

from scdlkit.foundation.strategies import CellData
from scdlkit.foundation.strategies._genes import LogNormalised
from scdlkit.foundation.strategies._variable_genes import gene_moments, variable_genes


def cells(seed: int, n_cells: int = 300, n_genes: int = 400) -> CellData:
    """Counts with genes of very different mean and dispersion."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(-1, 2, n_genes)
    counts = rng.poisson(rng.gamma(0.5, mean / 0.5, (n_cells, n_genes)) * rng.uniform(0.2, 2, (n_cells, 1)))
    counts[:, :5] = 0
    names = np.array([f"G{i}" for i in range(n_genes)], dtype=object)
    return CellData(expression=sp.csr_matrix(counts.astype(np.float32)), gene_names=names, kind="counts")


class Pieces:
    """The rows of a matrix in pieces, in an order that is not theirs."""

    def __init__(self, matrix: sp.csr_matrix, size: int) -> None:
        self.matrix, self.size, self.shape = matrix, size, matrix.shape

    def pieces(self):
        order = np.random.default_rng(0).permutation(self.shape[0])
        for start in range(0, len(order), self.size):
            rows = order[start : start + self.size]
            yield rows, self.matrix[rows]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_top_genes", [10, 100, 250])
def test_are_those_that_scanpy_finds(seed, n_top_genes):
    data = cells(seed)
    adata = AnnData(data.expression.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    varies = np.flatnonzero(adata.X.toarray().std(0) > 0)
    expected = sc.pp.highly_variable_genes(adata[:, varies].copy(), n_top_genes=n_top_genes, inplace=False)
    found = variable_genes(LogNormalised(data), n_top_genes)
    np.testing.assert_array_equal(found, varies[expected["highly_variable"].to_numpy()])


@pytest.mark.parametrize("size", [23, 300])
@pytest.mark.parametrize("kind", ["counts", "log1p"])
@pytest.mark.parametrize("twice", [False, True])
def test_pieces_make_no_difference(size, kind, twice):
    whole = cells(0)
    names = np.tile(whole.gene_names[:200], 2) if twice else whole.gene_names
    matrix = whole.expression.log1p() if kind == "log1p" else whole.expression
    one, two = (
        LogNormalised(CellData(expression=part, gene_names=names, kind=kind)) for part in (matrix, Pieces(matrix, size))
    )
    chosen = variable_genes(one, 50)
    np.testing.assert_array_equal(variable_genes(two, 50), chosen)
    for first, second in zip(gene_moments(one), gene_moments(two), strict=True):
        np.testing.assert_allclose(first.mean, second.mean, rtol=1e-12)
    first, second = (values.matrix(lambda rows: rows[:, chosen]) for values in (one, two))
    np.testing.assert_array_equal(first.toarray(), second.toarray())
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(one.names, two.names)
