from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from scdlkit.foundation.metrics import METRICS, classification_metrics, per_class_metrics

CLASSES = np.array(["B", "NK/T", "", "Zelle ü"], dtype=object)


def predictions(seed: int, n: int, n_classes: int, present: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(n_classes), size=n)
    return rng.integers(0, present, size=n), probabilities


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6), st.data())
def test_agrees_with_scikit_learn(seed: int, n: int, n_classes: int, data: st.DataObject) -> None:
    true, probabilities = predictions(seed, n, n_classes, data.draw(st.integers(1, n_classes)))
    found = classification_metrics(true, probabilities, [f"c{code}" for code in range(n_classes)])
    predicted = probabilities.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "macro_f1": reference.f1_score(true, predicted, average="macro", zero_division=0),
            "accuracy": reference.accuracy_score(true, predicted),
            "balanced_accuracy": reference.balanced_accuracy_score(true, predicted),
            "weighted_f1": reference.f1_score(true, predicted, average="weighted", zero_division=0),
            "mcc": reference.matthews_corrcoef(true, predicted),
        }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_auroc_agrees_with_scikit_learn(n_classes: int) -> None:
    true, probabilities = predictions(1, 200, n_classes, n_classes)
    probabilities = np.round(probabilities, 1) + 1e-3  # ties
    probabilities /= probabilities.sum(1, keepdims=True)
    found = classification_metrics(true, probabilities, list(map(str, range(n_classes))))
    scores = probabilities[:, 1] if n_classes == 2 else probabilities
    assert found["auroc_ovr"] == pytest.approx(reference.roc_auc_score(true, scores, multi_class="ovr"))
    assert found["auroc_note"] == ""


def test_auroc_says_why_it_is_missing() -> None:
    probabilities = np.full((3, 4), 0.25)
    some = classification_metrics(np.array([0, 1, 1]), probabilities, CLASSES)
    assert np.isnan(some["auroc_ovr"])
    assert some["auroc_note"] == "no cells of , Zelle ü"
    one = classification_metrics(np.array([1, 1, 1]), probabilities, CLASSES)
    assert np.isnan(one["auroc_ovr"])
    assert one["auroc_note"] == "all cells are NK/T"
    assert all(np.isfinite(one[name]) for name in METRICS if name != "auroc_ovr")


def test_per_class_agrees_with_scikit_learn() -> None:
    true, probabilities = predictions(3, 100, 4, 4)
    predicted = probabilities.argmax(1)
    table = per_class_metrics(true, predicted, CLASSES)
    expected = reference.precision_recall_fscore_support(true, predicted, labels=range(4))
    np.testing.assert_allclose(table[["precision", "recall", "f1", "support"]].to_numpy().T, expected)
    assert table["class"].tolist() == CLASSES.tolist()


def test_per_class_marks_what_is_not_defined() -> None:
    table = per_class_metrics(np.array([0, 0]), np.array([0, 1]), CLASSES)
    np.testing.assert_array_equal(table["precision"], [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(table["recall"], [0.5, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(table["f1"], [2 / 3, 0, np.nan, np.nan])


def test_macro_f1_is_the_mean_of_the_per_class_table() -> None:
    true, probabilities = predictions(5, 30, 6, 3)
    classes = list("abcdef")
    overall = classification_metrics(true, probabilities, classes)["macro_f1"]
    assert overall == pytest.approx(per_class_metrics(true, probabilities.argmax(1), classes)["f1"].mean())


@pytest.mark.parametrize(
    ("true", "probabilities", "message"),
    [
        (np.array([], dtype=int), np.empty((0, 2)), "no cells"),
        (np.array([0]), np.ones((1, 3)) / 3, r"cells x classes = \(1, 2\), found \(1, 3\)"),
        (np.array([2]), np.ones((1, 2)) / 2, "found 2 to 2"),
        (np.array([-1]), np.ones((1, 2)) / 2, "found -1"),
        (np.array([0]), np.array([[np.nan, 1]]), "1 NaN or infinite"),
    ],
)
def test_bad_input(true: np.ndarray, probabilities: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(true, probabilities, ["a", "b"])


def test_per_class_bad_input() -> None:
    with pytest.raises(ValueError, match="cells, predicted_codes"):
        per_class_metrics(np.array([0, 1]), np.array([0]), ["a", "b"])
