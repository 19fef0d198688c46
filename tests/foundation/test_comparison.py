from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from scdlkit.foundation.comparison import Outcome, run_strategy
from scdlkit.foundation.splits import Split, make_split
from scdlkit.foundation.strategies import CellData, Head, HeadConfig, Strategy, TrainingConfig

CLASSES = ["B", "NK/T", ""]
N = 300
TRUE = np.arange(N) % 3
CELLS = CellData(embedding=np.arange(N, dtype=np.float32)[:, None], codes=TRUE)
SPLIT = make_split(TRUE, np.arange(N), classes=CLASSES)


def run(strategy: Strategy, *, split: Split = SPLIT, cells: CellData = CELLS, seed: int = 0) -> Outcome:
    return run_strategy(strategy, cells, split, CLASSES, seed=seed, device="cpu", progress=False)


def test_a_real_strategy() -> None:
    rng = np.random.default_rng(0)
    embedding = (np.eye(3, 5)[TRUE] + rng.normal(scale=0.4, size=(N, 5))).astype(np.float32)
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=3)))
    outcome = run(head, cells=CellData(embedding=embedding, codes=TRUE))
    assert outcome.fitted is head and outcome.error == ""
    assert (outcome.strategy, outcome.role, outcome.uses_encoder) == ("head", "strategy", True)
    assert [row["epoch"] for row in outcome.history] == [1, 2, 3]
    assert outcome.fit_seconds > 0 and outcome.peak_memory_mb >= 0 and outcome.n_trainable == head.n_trainable
    predicted = head.predict_proba(CellData(embedding=embedding)).argmax(1)
    for part in ("val", "test"):
        index = getattr(SPLIT, part)
        np.testing.assert_array_equal(outcome.predicted_codes[part], predicted[index])
        assert outcome.metrics[f"{part}_macro_f1"] == pytest.approx(
            f1_score(TRUE[index], predicted[index], average="macro")
        )
        assert outcome.metrics[f"{part}_accuracy"] == pytest.approx(accuracy_score(TRUE[index], predicted[index]))
        np.testing.assert_allclose(
            outcome.per_class[part]["recall"], recall_score(TRUE[index], predicted[index], average=None)
        )


def test_it_learns_from_the_training_cells_under_the_seed(fixed: Any) -> None:
    strategy = fixed("one", TRUE)
    run(strategy, seed=11)
    ((cells, seed),) = strategy.calls
    np.testing.assert_array_equal(cells, SPLIT.train)
    assert seed == 11


def test_a_failure_is_a_result(fixed: Any) -> None:
    with pytest.warns(UserWarning, match="'bad' failed and is left out: ValueError: no luck"):
        outcome = run(fixed("bad", TRUE, error=ValueError))
    assert outcome.error == "ValueError: no luck"
    assert outcome.fitted is None and outcome.metrics == {} and outcome.n_trainable == 0
    with pytest.raises(KeyboardInterrupt):
        run(fixed("one", TRUE, error=KeyboardInterrupt))


def test_one_class_for_all_cells_is_reported(fixed: Any) -> None:
    with pytest.warns(UserWarning, match="'stuck' predicts NK/T for 100.0 % of the validation cells.*3 classes"):
        run(fixed("stuck", np.ones(N, dtype=int)))


def test_missing_classes_and_no_test_cells(fixed: Any) -> None:
    assignment = SPLIT.assignment.copy()
    assignment[(assignment == 1) & (TRUE == 2)] = 0
    assignment[assignment == 2] = -1
    outcome = run(fixed("one", TRUE), split=Split(assignment))
    assert outcome.notes == ["val: no cells of ", "test: no cells"]
    assert "test_macro_f1" not in outcome.metrics and "test" not in outcome.per_class
    assert outcome.metrics["val_macro_f1"] == 1
