from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from scdlkit.foundation.calibration import expected_calibration_error, reliability_table


def test_by_hand() -> None:
    table = reliability_table(np.array([True, False, True, True]), np.array([0.5, 0.6, 0.9, 0.0]), n_bins=2)
    assert table["cells"].tolist() == [2, 2]
    np.testing.assert_allclose(table["confidence"], [0.25, 0.75])
    np.testing.assert_allclose(table["accuracy"], [1.0, 0.5])
    np.testing.assert_allclose(table[["bin_left", "bin_right"]], [[0, 0.5], [0.5, 1]])
    error = expected_calibration_error(np.array([True, False, True, True]), np.array([0.5, 0.6, 0.9, 0.0]), n_bins=2)
    assert error == pytest.approx(0.5 * 0.75 + 0.5 * 0.25)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 20))
def test_agrees_with_scikit_learn(seed: int, n: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    correct = rng.random(n) < confidence
    table = reliability_table(correct, confidence, n_bins)
    assert table["cells"].sum() == n
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=n_bins)
    filled = table[table["cells"] > 0]
    np.testing.assert_allclose(filled["accuracy"], accuracy)
    np.testing.assert_allclose(filled["confidence"], mean_confidence)


def test_calibrated_predictions_have_a_small_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(50_000)
    assert expected_calibration_error(rng.random(50_000) < confidence, confidence) < 0.01
    assert expected_calibration_error(np.zeros(10, dtype=bool), np.ones(10)) == 1.0


def test_empty_bins_and_no_cells() -> None:
    table = reliability_table(np.array([True]), np.array([1.0]))
    assert np.isnan(table["accuracy"].iloc[0])
    assert table["accuracy"].iloc[-1] == 1
    assert np.isnan(expected_calibration_error(np.array([], dtype=bool), np.array([])))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="both must be"):
        reliability_table(np.array([True]), np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="2 values are not"):
        reliability_table(np.ones(3, dtype=bool), np.array([0.5, np.nan, 1.5]))
    with pytest.raises(ValueError, match="n_bins"):
        reliability_table(np.array([True]), np.array([0.5]), n_bins=0)
