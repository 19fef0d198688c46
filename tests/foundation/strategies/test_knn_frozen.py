from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from scdlkit.foundation.strategies import CellData, KNNFrozen, KNNFrozenConfig
from scdlkit.foundation.strategies import knn_frozen as module


def noisy(n: int, seed: int) -> CellData:
    """Cells whose classes overlap in the embedding."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 3
    embedding = np.eye(3, 8)[codes] + rng.normal(scale=0.7, size=(n, 8))
    return CellData(embedding=embedding.astype(np.float32), codes=codes)


def fitted(train: CellData, val: CellData, **settings: object) -> KNNFrozen:
    baseline = KNNFrozen(KNNFrozenConfig(**settings))
    baseline.fit(train, val, n_classes=3)
    return baseline


@pytest.mark.parametrize("n_neighbors", [1, 7, 200])
def test_equals_scikit_learn(n_neighbors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 120 * 7)  # several blocks of cells
    train, val, query = noisy(120, 0), noisy(60, 1), noisy(50, 2)
    baseline = fitted(train, val, n_neighbors=n_neighbors)
    reference = KNeighborsClassifier(min(n_neighbors, 120), metric="cosine", algorithm="brute")
    reference.fit(train.embedding.astype(np.float64), train.codes)
    expected = reference.predict_proba(query.embedding.astype(np.float64))
    np.testing.assert_allclose(baseline.predict_proba(query), expected, atol=1e-6)
    assert baseline.n_trainable == 0


def test_validation_cells_choose_the_number() -> None:
    train, val = noisy(300, 0), noisy(150, 1)
    baseline = fitted(train, val)
    chosen = baseline.metadata()["neighbours"]
    scores = {row["n_neighbors"]: row["val_macro_f1"] for row in chosen["tried"]}
    assert list(scores) == list(module.NEIGHBOURS)
    assert scores[chosen["n_neighbors"]] == max(scores.values()) > min(scores.values())
    fixed = fitted(train, val, n_neighbors=chosen["n_neighbors"])
    np.testing.assert_array_equal(fixed.predict_proba(val), baseline.predict_proba(val))


def test_cells_at_the_same_distance_vote_together() -> None:
    """Of four equal training cells two are asked for; which ones must not depend on their order."""
    embedding = np.tile(np.array([[1.0, 2.0, 3.0]], dtype=np.float32), (5, 1))
    embedding[4] = [-1, 0, 0]
    train = CellData(
        embedding=embedding * np.array([1, 2, 0.3, 7, 1], dtype=np.float32)[:, None], codes=np.array([0, 1, 1, 1, 2])
    )
    for order in (np.arange(5), np.array([3, 4, 1, 0, 2])):
        baseline = fitted(train.subset(order), train, n_neighbors=2)
        np.testing.assert_allclose(baseline.predict_proba(train.subset(np.array([0])))[0], [0.25, 0.75, 0])


def test_few_cells_are_kept_and_no_class_is_lost() -> None:
    codes = np.repeat([0, 1, 2], [900, 97, 3])
    cells = replace(noisy(1000, 0), codes=codes)
    baseline = fitted(cells, cells, max_cells=100)
    kept = baseline.state_dict()["codes"].numpy()
    assert np.bincount(kept).tolist() == [90, 9, 1] or (
        len(kept) == 100 and (np.bincount(kept) - [90, 10, 1]).max() <= 1
    )
    again = fitted(cells, cells, max_cells=100)
    np.testing.assert_array_equal(kept, again.state_dict()["codes"].numpy())
    assert len(fitted(cells, cells, max_cells=1000).state_dict()["codes"]) == 1000


def test_cells_with_an_empty_embedding() -> None:
    train = noisy(60, 0)
    query = replace(train, embedding=np.zeros_like(train.embedding))
    probabilities = fitted(train, train, n_neighbors=5).predict_proba(query)
    np.testing.assert_allclose(probabilities, 1 / 3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"n_neighbors": 0}, {"max_cells": 0.5}])
def test_config_is_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        KNNFrozenConfig(**settings)


def test_foreign_codes_are_refused() -> None:
    baseline = fitted(noisy(30, 0), noisy(30, 1))
    state = baseline.state_dict()
    with pytest.raises(ValueError, match=r"codes of strategy 'knn_frozen' must be in \[0, 3\)"):
        KNNFrozen().load_state(state | {"codes": state["codes"] + 1}, baseline.metadata())
