from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from scdlkit.foundation.strategies import CellData, PCALogReg, PCALogRegConfig


def fitted(train: CellData, val: CellData, **settings: object) -> PCALogReg:
    baseline = PCALogReg(PCALogRegConfig(**settings))
    baseline.fit(train, val, n_classes=3, seed=0)
    return baseline


@pytest.mark.parametrize("scale", [True, False])
def test_equals_the_usual_pipeline(train: CellData, val: CellData, query: CellData, scale: bool) -> None:
    baseline = fitted(train, val, n_top_genes=20, n_components=5, C=0.5, scale=scale)
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
    spread = one.std(0) if scale else 1.0
    pca = PCA(5, svd_solver="full").fit(one / spread)
    one, two = pca.transform(one / spread), pca.transform(two / spread)
    model = LogisticRegression(C=0.5, max_iter=1000).fit(one / one.std(0), train.codes)
    np.testing.assert_allclose(baseline.predict_proba(query), model.predict_proba(two / one.std(0)), atol=1e-3)


def test_learns_from_training_cells_alone(train: CellData, val: CellData, query: CellData) -> None:
    other = replace(val, expression=sp.csr_matrix(val.expression * 3))
    one, two = (fitted(train, cells, C=1.0).predict_proba(query) for cells in (val, other))
    np.testing.assert_array_equal(one, two)


def test_genes_are_aligned_by_name(
    train: CellData, val: CellData, query: CellData, caplog: pytest.LogCaptureFixture
) -> None:
    baseline = fitted(train, val)
    order = np.random.default_rng(0).permutation(60)
    shuffled = replace(query, expression=query.expression[:, order], gene_names=query.gene_names[order])
    with caplog.at_level(logging.WARNING, "scdlkit"):
        np.testing.assert_allclose(baseline.predict_proba(shuffled), baseline.predict_proba(query), atol=1e-6)
        assert caplog.text == ""
        fewer = replace(query, expression=query.expression[:, :45], gene_names=query.gene_names[:45])
        probabilities = baseline.predict_proba(fewer)
    assert "15 of its 60 genes (25 %)" in caplog.text
    assert (probabilities.argmax(1) == query.codes).mean() > 0.9
    with pytest.raises(ValueError, match="None of the 60 genes"):
        baseline.predict_proba(replace(query, gene_names=np.array([f"x{i}" for i in range(60)])))


def test_kinds_of_values_agree(train: CellData, val: CellData, query: CellData) -> None:
    baseline = fitted(train, val)
    normalised = sp.csr_matrix(query.expression.multiply(1e4 / query.expression.sum(1)))
    expected = baseline.predict_proba(query)
    per_million = normalised * 100.0  # another total must not pass for other cells
    for kind, matrix in (("normalised", normalised), ("normalised", per_million), ("log1p", normalised.log1p())):
        found = baseline.predict_proba(replace(query, expression=matrix, kind=kind))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="found 'scaled'"):
        baseline.predict_proba(replace(query, kind="scaled"))


@pytest.mark.parametrize("kind", ["counts", "log1p"])
def test_genes_of_one_name_are_one_gene(train: CellData, val: CellData, query: CellData, kind: str) -> None:
    rng = np.random.default_rng(0)
    counts = query.expression.toarray()
    part = rng.binomial(counts.astype(int), 0.5)
    doubled = sp.csr_matrix(np.hstack([part, counts - part]).astype(np.float32))
    single = query.expression
    if kind == "log1p":
        doubled, single = doubled.log1p(), single.log1p()
    twice = replace(query, expression=doubled, gene_names=np.tile(query.gene_names, 2), kind=kind)
    baseline = fitted(train, val)
    expected = baseline.predict_proba(replace(query, expression=single, kind=kind))
    np.testing.assert_allclose(baseline.predict_proba(twice), expected, atol=1e-5)


def test_few_cells_constant_genes_and_empty_cells(train: CellData, val: CellData) -> None:
    few = train.subset(np.arange(6))
    matrix = few.expression.toarray()
    matrix[0] = 0  # a cell without counts
    baseline = fitted(replace(few, expression=sp.csr_matrix(matrix)), val)
    assert len(baseline.state_dict()["offset"]) <= 6
    assert np.isfinite(baseline.predict_proba(val)).all()
    log = train.expression.log1p().toarray()
    log[:, 50:] = 2.0
    log[:, 40:50] = 0.0
    constant = replace(train, expression=sp.csr_matrix(log), kind="log1p")
    assert set(fitted(constant, val).metadata()["genes"]) == set(train.gene_names[:40])
    with pytest.raises(ValueError, match="All 60 genes are constant"):
        fitted(replace(constant, expression=sp.csr_matrix(np.ones_like(log))), val)


def test_fewer_cells_than_components_leave_out_the_empty_one(train: CellData, val: CellData, query: CellData) -> None:
    few = train.subset(np.concatenate([np.flatnonzero(train.codes == code)[:4] for code in range(3)]))
    few = few.subset(np.r_[np.arange(few.n_cells), 0])  # one cell twice: 13 cells span 11 directions
    one = fitted(few, val, C=1.0)
    assert one.state_dict()["coef"].shape == (3, 11)
    other = fitted(few, val, C=1.0, n_components=11)
    np.testing.assert_allclose(one.predict_proba(query), other.predict_proba(query), atol=1e-4)


def test_input_is_not_changed(train: CellData, val: CellData) -> None:
    before = train.expression.copy()
    fitted(train, val)
    np.testing.assert_array_equal(train.expression.toarray(), before.toarray())
    log = replace(train, expression=train.expression.log1p(), kind="log1p")
    before = log.expression.copy()
    fitted(log, replace(val, kind="normalised"))
    np.testing.assert_array_equal(log.expression.data, before.data)
