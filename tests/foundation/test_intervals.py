from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from scdlkit.foundation import intervals
from scdlkit.foundation.intervals import Estimate, resample_macro_f1


def predictions(n: int, error: float, rng: np.random.Generator, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    true = rng.integers(n_classes, size=n)
    return true, np.where(rng.random(n) < error, rng.integers(n_classes, size=n), true)


def macro(true: np.ndarray, predicted: np.ndarray) -> float:
    return float(f1_score(true, predicted, average="macro", zero_division=0))


@pytest.fixture(scope="module")
def one_fit() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    true, good = predictions(150, 0.3, rng)
    fair = np.where(rng.random(150) < 0.3, rng.integers(3, size=150), good)
    return true, {"good": good, "fair": fair}


@pytest.mark.parametrize("paired", [False, True])
def test_one_fit_agrees_with_scipy(one_fit: tuple, paired: bool) -> None:
    true, codes = one_fit

    def statistic(index: np.ndarray) -> float:
        score = macro(true[index], codes["good"][index])
        return score - macro(true[index], codes["fair"][index]) if paired else score

    theirs = bootstrap((np.arange(150),), statistic, n_resamples=1500, vectorized=False, rng=0, method="percentile")
    found = resample_macro_f1([true], {name: [predicted] for name, predicted in codes.items()}, 3, n_resamples=4000)
    ours = found.difference("good", "fair") if paired else found.score("good")
    assert ours.value == pytest.approx(statistic(np.arange(150)))
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.08)
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * width)


def test_several_fits_agree_with_brute_force() -> None:
    """Fits that differ in size and quality, cells drawn one by one and scored by scikit-learn."""
    rng = np.random.default_rng(1)
    fits = [predictions(n, error, rng) for n, error in ((60, 0.1), (90, 0.5), (120, 0.3))]
    other = [np.where(rng.random(len(true)) < 0.2, 0, predicted) for true, predicted in fits]
    expected = []
    for _ in range(800):
        scores = []
        for fit in rng.integers(3, size=3):
            true, predicted = fits[fit]
            index = rng.integers(len(true), size=len(true))
            scores.append(macro(true[index], predicted[index]) - macro(true[index], other[fit][index]))
        expected.append(np.mean(scores))
    found = resample_macro_f1(
        [true for true, _ in fits], {"a": [predicted for _, predicted in fits], "b": other}, 3, n_resamples=4000
    )
    ours = found.difference("a", "b")
    assert found.scores["a"] == pytest.approx(np.mean([macro(*fit) for fit in fits]))
    assert ours.error == pytest.approx(np.std(expected), rel=0.1)
    np.testing.assert_allclose(
        [ours.low, ours.high], np.quantile(expected, [0.025, 0.975]), atol=0.1 * (ours.high - ours.low)
    )
    alone = resample_macro_f1([fits[0][0]], {"a": [fits[0][1]]}, 3).score("a")
    assert found.score("a").error > alone.error / np.sqrt(3)  # fits that differ make it wider


def test_intervals_cover_the_truth() -> None:
    """Labels and predictions from a known distribution: 95 % intervals hold its macro-F1 in about 95 of 100 data sets."""
    rng = np.random.default_rng(2)
    joint = np.array([[0.45, 0.05, 0.0], [0.03, 0.2, 0.07], [0.02, 0.03, 0.15]])
    truth = np.mean(2 * np.diagonal(joint) / (joint.sum(0) + joint.sum(1)))
    covered = 0
    for seed in range(200):
        true, predicted = np.divmod(rng.choice(9, size=200, p=joint.ravel()), 3)
        found = resample_macro_f1([true], {"a": [predicted]}, 3, n_resamples=400, seed=seed).score("a")
        covered += found.low <= truth <= found.high
    assert 180 <= covered <= 198


def test_a_difference_of_nothing_is_nothing(one_fit: tuple) -> None:
    true, codes = one_fit
    found = resample_macro_f1([true, true[:50]], {"a": [codes["good"], codes["good"][:50]]} | {
        "b": [codes["good"], codes["good"][:50]], "sure": [true, true[:50]]
    }, 3)  # fmt: skip
    assert found.difference("a", "b") == Estimate(0, 0, 0, 0)
    assert not found.difference("a", "b").excludes_zero
    assert found.score("sure") == Estimate(1, 1, 1, 0)
    assert found.difference("sure", "a").excludes_zero
    assert found.difference("a", "sure").excludes_zero
    assert found.difference("a", "sure").high < 0


def test_order_of_cells_and_pieces_change_nothing(one_fit: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    true, codes = one_fit
    order = np.random.default_rng(3).permutation(150)

    def draws(true: np.ndarray, good: np.ndarray) -> np.ndarray:
        return resample_macro_f1([true, true[::-1]], {"good": [good, good[::-1]]}, 5, n_resamples=50).draws["good"]

    first = draws(true, codes["good"])
    np.testing.assert_array_equal(first, draws(true[order], codes["good"][order]))
    monkeypatch.setattr(intervals, "_CHUNK", 20)
    np.testing.assert_array_equal(first, draws(true, codes["good"]))


def test_a_class_of_one_cell() -> None:
    """It is missing in a third of the resamples; these score the classes they have, as scikit-learn would."""
    true, predicted = np.array([0] * 20 + [1]), np.array([0] * 20 + [1])
    assert resample_macro_f1([true], {"a": [predicted]}, 2).score("a") == Estimate(1, 1, 1, 0)
    missed = resample_macro_f1([true], {"a": [np.zeros(21, dtype=int)]}, 2)
    assert missed.score("a").high == 1  # where the missed cell was not drawn
    assert missed.scores["a"] == pytest.approx(macro(true, np.zeros(21)))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must hold fits with cells, found none"):
        resample_macro_f1([], {}, 2)
    with pytest.raises(ValueError, match=r"found \[2, 0\]"):
        resample_macro_f1([np.zeros(2, int), np.zeros(0, int)], {}, 2)
    with pytest.raises(ValueError, match=r"predicted_codes\['a'\] has fits with \[3\] cells, true_codes with \[2\]"):
        resample_macro_f1([np.zeros(2, int)], {"a": [np.zeros(3, int)]}, 2)
