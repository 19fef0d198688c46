from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from scdlkit.foundation.strategies._scores import f1_from_counts, log_loss, macro_f1


def test_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true, probabilities = rng.integers(0, 4, 80), rng.dirichlet(np.ones(4), 80)
    predicted = probabilities.argmax(1)
    assert macro_f1(true, predicted, 6) == pytest.approx(reference.f1_score(true, predicted, average="macro"))
    assert log_loss(true, probabilities) == pytest.approx(reference.log_loss(true, probabilities))


def test_edges() -> None:
    none = np.array([], dtype=int)
    assert np.isnan(macro_f1(none, none, 2))
    assert np.isnan(log_loss(none, np.empty((0, 2))))
    assert np.isfinite(log_loss(np.array([0]), np.array([[0.0, 1.0]])))
    np.testing.assert_array_equal(f1_from_counts(np.diag([0, 0, 3])), [np.nan, np.nan, 1])
    np.testing.assert_array_equal(f1_from_counts(np.array([[0, 0], [2, 0]])), [0, 0])
