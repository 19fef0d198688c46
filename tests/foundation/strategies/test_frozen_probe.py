from __future__ import annotations

import logging

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scdlkit.foundation.strategies import CellData, FrozenProbe, FrozenProbeConfig
from scdlkit.foundation.strategies._logistic import C_GRID


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_equals_scikit_learn(
    train: CellData, val: CellData, query: CellData, n_classes: int, class_weight: str | None
) -> None:
    train, val = (cells.subset(np.flatnonzero(cells.codes < n_classes)[5:]) for cells in (train, val))
    probe = FrozenProbe(FrozenProbeConfig(C=0.3, class_weight=class_weight))
    probe.fit(train, val, n_classes=n_classes)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, class_weight=class_weight, max_iter=1000))
    reference.fit(train.embedding.astype(np.float64), train.codes)
    np.testing.assert_allclose(
        probe.predict_proba(query), reference.predict_proba(query.embedding.astype(np.float64)), atol=1e-6
    )
    weights = reference[-1]
    assert probe.n_trainable == weights.coef_.size + weights.intercept_.size


def test_validation_cells_choose_C(train: CellData, val: CellData) -> None:
    probe = FrozenProbe()
    probe.fit(train, val, n_classes=3)
    chosen = probe.metadata()["regularisation"]
    assert [row["C"] for row in chosen["tried"]] == list(C_GRID)
    best = max(row["val_macro_f1"] for row in chosen["tried"])
    assert probe.history[0]["val_macro_f1"] == best
    assert probe.history[0]["epoch"] == 0
    fixed = FrozenProbe(FrozenProbeConfig(C=chosen["C"]))
    fixed.fit(train, val, n_classes=3)
    np.testing.assert_array_equal(fixed.predict_proba(val), probe.predict_proba(val))


def test_class_without_training_cells_has_probability_zero(train: CellData, val: CellData) -> None:
    probe = FrozenProbe()
    probe.fit(train.subset(np.flatnonzero(train.codes != 1)), val, n_classes=3)
    assert (probe.predict_proba(val)[:, 1] == 0).all()


def test_solver_that_stops_early_says_so(train: CellData, val: CellData, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scdlkit"):
        FrozenProbe(FrozenProbeConfig(C=10.0, max_iter=2)).fit(train, val, n_classes=3)
    assert "stopped at max_iter=2" in caplog.text
