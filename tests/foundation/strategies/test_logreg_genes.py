from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from sklearn.linear_model import LogisticRegression

from scdlkit.foundation.strategies import CellData, LogRegGenes, LogRegGenesConfig, PCALogReg, PCALogRegConfig
from scdlkit.foundation.strategies._logistic import C_GRID


def fitted(train: CellData, val: CellData, **settings: object) -> LogRegGenes:
    baseline = LogRegGenes(LogRegGenesConfig(**settings))
    baseline.fit(train, val, n_classes=3)
    return baseline


@pytest.mark.parametrize("scale", [True, False])
def test_equals_the_usual_pipeline_on_centred_genes(
    train: CellData, val: CellData, query: CellData, scale: bool
) -> None:
    baseline = fitted(train, val, n_top_genes=20, C=0.05, scale=scale)
    matrices = []
    for cells in (train, query):
        adata = AnnData(cells.expression.toarray())
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        matrices.append(adata)
    sc.pp.highly_variable_genes(matrices[0], n_top_genes=20)
    chosen = matrices[0].var["highly_variable"].to_numpy()
    assert set(baseline.metadata()["genes"]) == set(train.gene_names[chosen])
    one, two = (adata.X[:, chosen].astype(np.float64) for adata in matrices)
    mean, spread = one.mean(0), one.std(0) if scale else 1.0
    model = LogisticRegression(C=0.05, tol=1e-8, max_iter=10_000).fit((one - mean) / spread, train.codes)
    expected = model.predict_proba((two - mean) / spread)
    np.testing.assert_allclose(baseline.predict_proba(query), expected, atol=0.01)  # our solver stops earlier


def test_same_genes_as_pca_logreg(train: CellData, val: CellData) -> None:
    other = PCALogReg(PCALogRegConfig(n_top_genes=25, C=1.0))
    other.fit(train, val, n_classes=3)
    assert fitted(train, val, n_top_genes=25, C=1.0).metadata()["genes"] == other.metadata()["genes"]


def test_validation_cells_choose_C_and_nothing_else(train: CellData, val: CellData, query: CellData) -> None:
    chosen = fitted(train, val).metadata()["regularisation"]
    assert [row["C"] for row in chosen["tried"]] == list(C_GRID)
    other = replace(val, expression=sp.csr_matrix(val.expression * 3))
    one, two = (fitted(train, cells, C=1.0).predict_proba(query) for cells in (val, other))
    np.testing.assert_array_equal(one, two)


def test_genes_stay_sparse(train: CellData, val: CellData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sp.csr_matrix, "toarray", lambda self: pytest.fail("the cells were made dense"))
    baseline = fitted(train, val, C=1.0)
    assert baseline.predict_proba(val).shape == (45, 3)


@pytest.mark.parametrize("settings", [{"n_top_genes": 0}, {"scale": 1}, {"C": 0}])
def test_config_is_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        LogRegGenesConfig(**settings)
