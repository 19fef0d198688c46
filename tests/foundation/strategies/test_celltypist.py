"""Against the package itself, where it is installed; what happens without it in any case."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from scdlkit.foundation.strategies import (
    CellData,
    CellTypist,
    CellTypistConfig,
    all_baselines,
    build_strategies,
    get_strategy,
)
from scdlkit.foundation.strategies.celltypist import _import_celltypist


def log_normalised(cells: CellData) -> AnnData:
    adata = AnnData(cells.expression.copy())
    adata.var_names = cells.gene_names.astype(str)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


@pytest.fixture
def package():
    pytest.importorskip("celltypist")
    return _import_celltypist()


def fitted(train: CellData, val: CellData, **settings: object) -> CellTypist:
    baseline = CellTypist(CellTypistConfig(**settings))
    baseline.fit(train, val, n_classes=3, seed=4)
    return baseline


@pytest.mark.parametrize(
    "settings", [{"use_SGD": True}, {"use_SGD": True, "feature_selection": True, "top_genes": 8, "alpha": 0.01}]
)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_equals_the_package(package, train, val, query, n_classes: int, settings: dict[str, object]) -> None:
    train = train.subset(np.flatnonzero(train.codes < n_classes))
    baseline = fitted(train, val, **settings)
    some = np.flatnonzero(np.arange(60) % 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.train(log_normalised(train), train.codes, check_expression=True, random_state=4, **settings)
        expected = package.annotate(log_normalised(query), model=model)
        fewer = package.annotate(log_normalised(query)[:, some].copy(), model=model)
    assert baseline.metadata()["genes"] == model.features.tolist()
    assert baseline.n_trainable == model.classifier.coef_.size + model.classifier.intercept_.size
    found = baseline.predict_proba(query)
    np.testing.assert_array_equal(found.argmax(1), expected.predicted_labels["predicted_labels"].to_numpy())
    # ratios of the probabilities are the differences of the package's scores
    odds = np.exp(expected.decision_matrix.to_numpy() - expected.decision_matrix.max(axis=1).to_numpy()[:, None])
    np.testing.assert_allclose(found[:, :n_classes], odds / odds.sum(1, keepdims=True), atol=1e-4)
    # the values of the genes that stay are the same: they are taken as they are
    log = log_normalised(query)[:, some]
    part = replace(query, expression=log.X.copy(), gene_names=query.gene_names[some], kind="log1p")
    np.testing.assert_array_equal(
        baseline.predict_proba(part).argmax(1), fewer.predicted_labels["predicted_labels"].to_numpy()
    )


@pytest.mark.parametrize("n_classes", [2, 3])
def test_default_is_a_logistic_regression_of_each_class_against_the_rest(
    package, train, val, query, n_classes: int
) -> None:
    """Whatever scikit-learn there is; scaled, cut at 10, absent and constant genes left out."""
    counts = train.expression.toarray()
    counts[:, 59], counts[0, 3] = 0, 5000
    train = replace(train, expression=sp.csr_matrix(counts)).subset(np.flatnonzero(train.codes < n_classes))
    baseline = fitted(train, val)
    scaler = StandardScaler()
    one = np.minimum(scaler.fit_transform(log_normalised(train).X.toarray()[:, :59]), 10)
    two = np.minimum(scaler.transform(log_normalised(query).X.toarray()[:, :59]), 10)
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000)).fit(one, train.codes)
    found = baseline.predict_proba(query)
    scores = model.decision_function(two)
    np.testing.assert_array_equal(found.argmax(1), model.predict(two))
    if n_classes == 3:
        np.testing.assert_allclose(found, softmax(scores, axis=1), atol=1e-3)


def test_nothing_of_the_session_is_changed(package, train, val) -> None:
    root, own = logging.getLogger(), logging.getLogger("celltypist")
    before = list(root.handlers), root.level, own.level, list(warnings.filters)
    for name in [name for name in sys.modules if name.partition(".")[0] == "celltypist"]:
        del sys.modules[name]
    fitted(train, val)
    assert (list(root.handlers), root.level, own.level, list(warnings.filters)) == before


def test_stopping_early_is_said(package, train, val, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scdlkit"):
        fitted(train, val, max_iter=1)
    assert "celltypist: stopped at the last iteration (max_iter=1)" in caplog.text


def test_needs_its_package_to_fit_and_not_to_predict(
    train, val, query, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = None
    if "celltypist" in all_baselines():
        saved = fitted(train, val)
        expected = saved.predict_proba(query)
    monkeypatch.setitem(sys.modules, "celltypist", None)
    message = r'celltypist not found.*pip install "scdlkit\[celltypist\]"'
    with pytest.raises(ImportError, match=message):
        build_strategies(["head", "celltypist"])
    with pytest.raises(ImportError, match=message):
        build_strategies(["head", "mine"], {"mine": CellTypistConfig()})
    with pytest.raises(ImportError, match=message):
        fitted(train, val)
    with caplog.at_level(logging.WARNING, "scdlkit"):
        assert set(all_baselines()) == {"pca_logreg", "logreg_genes", "knn_frozen"}
    assert 'celltypist, which needs the extra: pip install "scdlkit[celltypist]"' in caplog.text
    if saved is not None:
        loaded = get_strategy("celltypist")()
        loaded.load_state(saved.state_dict(), saved.metadata())
        np.testing.assert_array_equal(loaded.predict_proba(query), expected)


def test_foreign_codes_are_refused(package, train, val) -> None:
    baseline = fitted(train, val)
    state = baseline.state_dict()
    with pytest.raises(ValueError, match="class codes of strategy 'celltypist' do not fit 3 classes"):
        CellTypist().load_state(state | {"known": state["known"] + 1}, baseline.metadata())


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 0}, {"max_iter": 0}, {"feature_selection": "yes"}, {"C": 0}, {"use_SGD": 1.5}, {"top_genes": 1.5}],
)
def test_config_is_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CellTypistConfig(**settings)
