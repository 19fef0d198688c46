from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdlkit.foundation.strategies import CellData


def make_cells(n: int, n_classes: int = 3, *, width: int = 32, n_genes: int = 60, seed: int = 0) -> CellData:
    """Cells whose class shows in the embedding and in the counts; the same genes mark a class for every seed."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % n_classes
    embedding = 5 + 0.1 * (np.eye(n_classes, width)[codes] + rng.normal(scale=0.2, size=(n, width)))
    rates = np.full((n_classes, n_genes), 0.7)
    for code in range(n_classes):
        rates[code, code * 5 : code * 5 + 5] = 6
    return CellData(
        embedding=embedding.astype(np.float32),
        expression=sp.csr_matrix(rng.poisson(rates[codes]).astype(np.float32)),
        gene_names=np.array([f"GENE{i}" for i in range(n_genes)], dtype=object),
        kind="counts",
        codes=codes,
    )


@pytest.fixture
def train() -> CellData:
    return make_cells(120, seed=1)


@pytest.fixture
def val() -> CellData:
    return make_cells(45, seed=2)


@pytest.fixture
def query() -> CellData:
    return make_cells(60, seed=3)
