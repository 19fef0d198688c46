from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score

from scdlkit.foundation import comparison
from scdlkit.foundation.comparison import (
    HISTORY_COLUMNS,
    PER_CLASS_COLUMNS,
    TABLE_COLUMNS,
    Comparison,
    compare,
)
from scdlkit.foundation.splits import Split, make_split
from scdlkit.foundation.strategies import (
    CellData,
    FrozenProbe,
    FrozenProbeConfig,
    Head,
    HeadConfig,
    Strategy,
    TrainingConfig,
)

CLASSES = ["B", "NK/T", ""]


class Fixed(Strategy):
    """Predicts codes it was given for each cell, by the first dimension of the embedding."""

    config_class = FrozenProbeConfig
    needs = frozenset({"embedding"})

    def __init__(
        self, name: str, codes: np.ndarray, *, role: str = "strategy", error: type[BaseException] | None = None
    ) -> None:
        super().__init__(name=name)
        self.codes, self.error = codes, error
        self.role = role

    @property
    def uses_encoder(self) -> bool:
        return self.role == "strategy" or self.name.endswith("_frozen")

    def fit(self, train: CellData, val: CellData, **kwargs: Any) -> None:
        if self.error is not None:
            raise self.error("no luck")
        self.n_trainable = 7

    def predict_proba(self, cells: CellData) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[self.codes[cells.embedding[:, 0].astype(int)]]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Any, metadata: Any) -> None: ...


N = 300
TRUE = np.arange(N) % 3
CELLS = CellData(embedding=np.arange(N, dtype=np.float32)[:, None], codes=TRUE)
SPLIT = make_split(TRUE, np.arange(N), classes=CLASSES)


def wrong(share: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(N) < share, (TRUE + 1) % 3, TRUE)


def run(*strategies: Strategy, split: Split = SPLIT, cells: CellData = CELLS) -> Comparison:
    return compare(strategies, cells, split, CLASSES, progress=False)


def test_real_strategies_on_real_columns() -> None:
    rng = np.random.default_rng(0)
    embedding = (np.eye(3, 5)[TRUE] + rng.normal(scale=0.4, size=(N, 5))).astype(np.float32)
    result = run(
        FrozenProbe(),
        Head(HeadConfig(training=TrainingConfig(max_epochs=3))),
        cells=CellData(embedding=embedding, codes=TRUE),
    )
    assert result.table.columns.tolist() == list(TABLE_COLUMNS)
    assert result.history.columns.tolist() == list(HISTORY_COLUMNS)
    assert result.per_class.columns.tolist() == list(PER_CLASS_COLUMNS)
    assert result.table["strategy"].tolist() == ["frozen_probe", "head"]
    assert sorted(result.table["rank"]) == [1, 2]
    assert result.history.groupby("strategy").size().to_dict() == {"frozen_probe": 1, "head": 3}
    assert len(result.per_class) == 2 * 2 * 3
    assert (result.table["fit_seconds"] > 0).all()
    assert (result.table["peak_memory_mb"] >= 0).all()
    assert (result.table["error"] == "").all()
    row = result.table.set_index("strategy").loc["head"]
    predicted = result.fitted["head"].predict_proba(CellData(embedding=embedding)).argmax(1)
    assert row["test_macro_f1"] == pytest.approx(f1_score(TRUE[SPLIT.test], predicted[SPLIT.test], average="macro"))
    assert row["val_accuracy"] == pytest.approx(accuracy_score(TRUE[SPLIT.val], predicted[SPLIT.val]))
    assert row["n_trainable"] == result.fitted["head"].n_trainable
    assert "no baseline ran" in result.recommend()


def test_validation_ranks_and_test_does_not() -> None:
    good_on_val, good_on_test = wrong(0.5), wrong(0.5)
    good_on_val[SPLIT.val] = TRUE[SPLIT.val]
    good_on_test[SPLIT.test] = TRUE[SPLIT.test]
    result = run(Fixed("tester", good_on_test), Fixed("validator", good_on_val))
    assert result.best == "validator"
    assert result.table["rank"].tolist() == [2, 1]
    assert result.table["test_macro_f1"].tolist()[0] == 1


def test_smaller_and_faster_break_ties() -> None:
    small, large = Fixed("small", TRUE), Fixed("large", TRUE)
    small.fit = lambda *args, **kwargs: setattr(small, "n_trainable", 3)
    assert run(large, small).best == "small"


def test_baseline_is_ranked_and_never_best() -> None:
    result = run(Fixed("model", wrong(0.3)), Fixed("genes", TRUE, role="baseline"))
    assert result.table.set_index("strategy")["rank"].to_dict() == {"model": 2, "genes": 1}
    assert result.best == "model"
    assert "not worth it here, the baseline is no worse" in result.recommend()
    assert "for report only, " in result.recommend()


def test_a_baseline_on_the_embedding_says_nothing_against_the_foundation_model() -> None:
    model, genes = Fixed("model", wrong(0.05)), Fixed("genes", wrong(0.4), role="baseline")
    result = run(model, genes, Fixed("knn_frozen", TRUE, role="baseline"))
    assert result.table.set_index("strategy")["uses_encoder"].to_dict() == {
        "model": True,
        "genes": False,
        "knn_frozen": True,
    }
    assert result.table.set_index("strategy")["rank"]["knn_frozen"] == 1
    assert "the foundation model is ahead" in result.recommend()
    assert "not worth it" not in result.recommend()


def test_recommendation_weighs_the_difference_by_its_error() -> None:
    clear = run(Fixed("model", TRUE), Fixed("genes", wrong(0.4), role="baseline"))
    assert "ahead by more than one standard error" in clear.recommend()
    barely = TRUE.copy()
    barely[SPLIT.val[0]] = (TRUE[SPLIT.val[0]] + 1) % 3
    model, genes = wrong(0.3, seed=1), wrong(0.3, seed=2)
    close = run(Fixed("model", TRUE), Fixed("genes", barely, role="baseline"))
    difference, error = close.difference("model", "genes")
    assert 0 < difference <= error * 1.5
    noisy = run(Fixed("one", model), Fixed("two", genes, role="baseline"))
    difference, error = noisy.difference("one", "two")
    assert ("not worth it here" in noisy.recommend()) == (difference <= error)


def test_difference_agrees_with_scipy() -> None:
    result = run(Fixed("one", wrong(0.2, seed=1)), Fixed("two", wrong(0.4, seed=2)))
    true = result.true_codes["val"]
    one, two = (result.predicted_codes[name]["val"] for name in ("one", "two"))

    def statistic(index: np.ndarray) -> float:
        index = index.astype(int)
        first, second = (f1_score(true[index], codes[index], average="macro") for codes in (one, two))
        return first - second

    expected = bootstrap((np.arange(len(true)),), statistic, n_resamples=500, vectorized=False, rng=0, method="basic")
    difference, error = result.difference("one", "two")
    assert difference == pytest.approx(statistic(np.arange(len(true))))
    assert error == pytest.approx(expected.standard_error, rel=0.15)
    assert result.difference("two", "one")[0] == pytest.approx(-difference)
    assert result.difference("one", "one") == (0, 0)
    with pytest.raises(KeyError, match="three"):
        result.difference("one", "three")


def test_one_failure_leaves_the_others() -> None:
    with pytest.warns(UserWarning, match="'bad' failed and is left out: ValueError: no luck"):
        result = run(Fixed("bad", TRUE, error=ValueError), Fixed("good", wrong(0.2)))
    bad = result.table.set_index("strategy").loc["bad"]
    assert bad["error"] == "ValueError: no luck"
    assert bad["rank"] == 2
    assert np.isnan(bad["val_macro_f1"])
    assert result.errors == {"bad": "ValueError: no luck"}
    assert list(result.fitted) == ["good"]
    assert result.table["n_trainable"].tolist() == [0, 7]


def test_baseline_alone_survives() -> None:
    with pytest.warns(UserWarning, match="failed"):
        result = run(Fixed("bad", TRUE, error=MemoryError), Fixed("genes", TRUE, role="baseline"))
    assert result.best == "genes"
    assert result.recommend().startswith("No strategy but the baseline genes finished")


def test_all_failing_raises_with_reasons() -> None:
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match=r"one: ValueError.*two: KeyErr"):
        run(Fixed("one", TRUE, error=ValueError), Fixed("two", TRUE, error=KeyError))


def test_interrupt_before_anything_is_finished_passes(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Fixed("one", TRUE, error=KeyboardInterrupt), Fixed("two", TRUE))
    assert "Interrupted, nothing is compared. A call with output_dir keeps what it has done" in caplog.text


def test_interrupt_keeps_what_is_finished() -> None:
    with pytest.warns(UserWarning) as warned:
        result = run(
            Fixed("one", wrong(0.1)),
            Fixed("bad", TRUE, error=ValueError),
            Fixed("two", TRUE, error=KeyboardInterrupt),
            Fixed("three", TRUE),
        )
    assert result.best == "one" and set(result.fitted) == {"one"} and result.unfinished == ("two", "three")
    assert "Interrupted: not compared are two, three; finished are one" in str(warned[-1].message)
    table = result.table.set_index("strategy")
    assert table["error"].tolist() == ["", "ValueError: no luck"] + 2 * ["KeyboardInterrupt: not finished"]
    assert table.loc["three", "rank"] == 4 and np.isnan(table.loc["three", "val_macro_f1"])
    alone = run(Fixed("one", wrong(0.1)))
    assert table.loc["one", "test_macro_f1"] == alone.table["test_macro_f1"][0]


def test_an_error_of_one_among_several_processes_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it in a step that it does not take part in."""
    monkeypatch.setattr(comparison, "launched_processes", lambda: 2)
    with pytest.raises(MemoryError):
        run(Fixed("one", TRUE), Fixed("two", TRUE, error=MemoryError))
    with pytest.raises(KeyboardInterrupt):
        run(Fixed("one", TRUE), Fixed("two", TRUE, error=KeyboardInterrupt))
    with pytest.warns(UserWarning, match="'two' failed"):
        assert run(Fixed("one", TRUE), Fixed("two", TRUE, error=FloatingPointError)).best == "one"


def test_one_class_for_all_cells_is_reported() -> None:
    with pytest.warns(UserWarning, match="'stuck' predicts NK/T for 100.0 % of the validation cells.*3 classes"):
        run(Fixed("stuck", np.ones(N, dtype=int)))


def test_missing_classes_and_no_test_cells() -> None:
    assignment = SPLIT.assignment.copy()
    assignment[(assignment == 1) & (TRUE == 2)] = 0
    assignment[assignment == 2] = -1
    result = run(Fixed("one", TRUE), Fixed("genes", wrong(0.3), role="baseline"), split=Split(assignment))
    row = result.table.iloc[0]
    assert row["auroc_note"] == "val: no cells of ; test: no cells"
    assert np.isnan(row["test_macro_f1"])
    assert "no test cells" in result.recommend()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="empty"):
        run()
    with pytest.raises(ValueError, match="different names, found one, one"):
        run(Fixed("one", TRUE), Fixed("one", TRUE))
    with pytest.raises(ValueError, match="300 label codes, split 5"):
        run(Fixed("one", TRUE), split=Split(np.zeros(5, dtype=np.int8)))
