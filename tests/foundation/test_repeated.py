from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, recall_score

from scdlkit.foundation._summary import (
    DIFFERENCE_COLUMNS,
    FOLD_COLUMNS,
    HISTORY_COLUMNS,
    LEAKAGE_COLUMNS,
    PER_CLASS_COLUMNS,
    TABLE_COLUMNS,
)
from scdlkit.foundation.intervals import resample_macro_f1
from scdlkit.foundation.plan import Fit, SplitPlan
from scdlkit.foundation.repeated import Comparison, compare
from scdlkit.foundation.splits import Split
from scdlkit.foundation.strategies import CellData, FrozenProbe, Head, HeadConfig, Strategy, TrainingConfig

CLASSES = ["B", "NK/T", ""]
N = 300
TRUE = np.arange(N) % 3
NAMES = np.arange(N)
CELLS = CellData(embedding=np.arange(N, dtype=np.float32)[:, None], codes=TRUE)
ONE = SplitPlan().fits(TRUE, NAMES, classes=CLASSES)
SPLIT = ONE[0].split
SIX = SplitPlan(n_repeats=2, cv=3).fits(TRUE, NAMES, classes=CLASSES)


def wrong(share: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(N) < share, (TRUE + 1) % 3, TRUE)


def run(*strategies: Strategy, fits: list[Fit] = ONE, cells: CellData = CELLS) -> Comparison:
    return compare(strategies, cells, fits, CLASSES, progress=False)


def macro(predicted: np.ndarray, index: np.ndarray) -> float:
    return float(f1_score(TRUE[index], predicted[index], average="macro"))


def embedded(noise: float = 0.4) -> CellData:
    embedding = np.eye(3, 5)[TRUE] + np.random.default_rng(0).normal(scale=noise, size=(N, 5))
    return CellData(embedding=embedding.astype(np.float32), codes=TRUE)


def test_one_fit_of_real_strategies() -> None:
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=3)))
    result = run(FrozenProbe(), head, cells=embedded())
    for table, columns in (
        (result.table, TABLE_COLUMNS),
        (result.folds, FOLD_COLUMNS),
        (result.history, HISTORY_COLUMNS),
        (result.per_class, PER_CLASS_COLUMNS),
        (result.differences, DIFFERENCE_COLUMNS),
        (result.leakage, LEAKAGE_COLUMNS),
    ):
        assert table.columns.tolist() == list(columns)
    assert result.table["strategy"].tolist() == ["frozen_probe", "head"]
    assert sorted(result.table["rank"]) == [1, 2]
    assert (result.table["n_fits"] == 1).all() and result.table["val_macro_f1_sd"].isna().all()
    assert result.history.groupby("strategy").size().to_dict() == {"frozen_probe": 1, "head": 3}
    assert result.leakage.empty
    assert result.fitted["head"] is head
    row = result.table.set_index("strategy").loc["head"]
    predicted = head.predict_proba(CellData(embedding=embedded().embedding)).argmax(1)
    assert row["test_macro_f1"] == pytest.approx(macro(predicted, SPLIT.test))
    assert row["val_macro_f1_low"] <= row["val_macro_f1"] <= row["val_macro_f1_high"]
    assert "no baseline without the foundation model finished" in result.recommendation


def test_several_fits_are_means_of_single_ones(fixed: Any) -> None:
    codes = {"one": wrong(0.2, seed=1), "two": wrong(0.4, seed=2)}
    result = run(*(fixed(name, predicted) for name, predicted in codes.items()), fits=SIX)
    table = result.table.set_index("strategy")
    assert (table["n_fits"] == 6).all()
    assert result.folds[["strategy", "repeat", "fold"]].values.tolist() == [
        [name, repeat, fold] for repeat in range(2) for fold in range(3) for name in codes
    ]
    for name, predicted in codes.items():
        for part in ("val", "test"):
            scores = [macro(predicted, getattr(fit.split, part)) for fit in SIX]
            of_fits = result.folds.loc[result.folds["strategy"] == name, f"{part}_macro_f1"]
            np.testing.assert_allclose(of_fits, scores)
            assert table.loc[name, f"{part}_macro_f1"] == pytest.approx(np.mean(scores))
            assert table.loc[name, f"{part}_macro_f1_sd"] == pytest.approx(np.std(scores, ddof=1))
        recalls = [
            recall_score(TRUE[fit.split.test], predicted[fit.split.test], average=None, labels=range(3)) for fit in SIX
        ]
        rows = result.per_class.query("strategy == @name and split == 'test'")
        np.testing.assert_allclose(rows["recall"], np.mean(recalls, axis=0))
        f1 = [f1_score(TRUE[fit.split.test], predicted[fit.split.test], average=None) for fit in SIX]
        np.testing.assert_allclose(rows["f1_sd"], np.std(f1, axis=0, ddof=1))
        supports = [np.bincount(TRUE[fit.split.test], minlength=3) for fit in SIX]
        np.testing.assert_allclose(rows["support"], np.mean(supports, axis=0))
    assert (result.history.groupby(["strategy", "repeat", "fold"]).size() == 1).all()
    assert len(result.history) == 12


def test_every_fit_has_its_cells_and_its_seed(fixed: Any) -> None:
    strategy = fixed("one", TRUE)
    result = run(strategy, fits=SIX)
    for (cells, seed), fit in zip(strategy.calls, SIX, strict=True):
        np.testing.assert_array_equal(cells, fit.split.train)
        assert seed == fit.seed
    assert result.fitted["one"] is strategy  # the one of the first fit is kept


def test_copies_of_real_strategies_are_fitted_anew() -> None:
    """Each fit equals the same fit on its own."""
    together = run(
        FrozenProbe(), Head(HeadConfig(training=TrainingConfig(max_epochs=2))), fits=SIX, cells=embedded(1.0)
    )
    for fit in (SIX[0], SIX[4]):
        alone = run(
            FrozenProbe(), Head(HeadConfig(training=TrainingConfig(max_epochs=2))), fits=[fit], cells=embedded(1.0)
        )
        rows = together.folds.query("repeat == @fit.repeat and fold == @fit.fold").reset_index(drop=True)
        timed = ["fit_seconds", "peak_memory_mb"]
        pd.testing.assert_frame_equal(rows.drop(columns=timed), alone.folds.drop(columns=timed))


def test_intervals_and_differences_are_paired(fixed: Any) -> None:
    codes = {"genes": wrong(0.3, seed=1), "model": wrong(0.1, seed=2), "other": wrong(0.12, seed=3)}
    result = run(
        fixed("genes", codes["genes"], role="baseline"),
        fixed("model", codes["model"]),
        fixed("other", codes["other"]),
        fits=SIX,
    )
    best = result.best
    assert best in ("model", "other")
    for part in ("val", "test"):
        index = [getattr(fit.split, part) for fit in SIX]
        expected = resample_macro_f1(
            [TRUE[cells] for cells in index],
            {name: [predicted[cells] for cells in index] for name, predicted in codes.items()},
            3,
            seed=SIX[0].seed,
        )
        rows = result.differences.query("split == @part").set_index(["strategy", "reference"])
        assert set(rows.index) == {
            ("model", "genes"),
            ("other", "genes"),
            ("genes", best),
            ("other" if best == "model" else "model", best),
        }
        for name, reference in rows.index:
            difference = expected.difference(name, reference)
            row = rows.loc[(name, reference)]
            assert (row["difference"], row["low"], row["high"]) == pytest.approx(difference[:3])
            assert row["excludes_zero"] == (row["low"] > 0 or row["high"] < 0)
            assert row["reference_role"] == ("baseline" if reference == "genes" else "best")
        for row in result.table.itertuples():
            score = expected.score(row.strategy)
            assert getattr(row, f"{part}_macro_f1_low") == pytest.approx(score.low)
            assert getattr(row, f"{part}_macro_f1_high") == pytest.approx(score.high)
    assert result.differences["excludes_zero"].dtype == bool


def test_validation_ranks_and_test_does_not(fixed: Any) -> None:
    good_on_val, good_on_test = wrong(0.5), wrong(0.5)
    good_on_val[SPLIT.val] = TRUE[SPLIT.val]
    good_on_test[SPLIT.test] = TRUE[SPLIT.test]
    result = run(fixed("tester", good_on_test), fixed("validator", good_on_val))
    assert result.best == "validator"
    assert result.table["rank"].tolist() == [2, 1]
    assert result.table["test_macro_f1"].tolist()[0] == 1


def test_labels_of_the_test_cells_choose_nothing() -> None:
    """Real strategies; the labels of the test cells are permuted."""

    def outcome(cells: CellData) -> Comparison:
        head = Head(HeadConfig(training=TrainingConfig(max_epochs=4)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return run(FrozenProbe(), FrozenProbe({"C": 1e-4}, name="flat"), head, cells=cells)

    cells = embedded(1.0)
    permuted = TRUE.copy()
    permuted[SPLIT.test] = np.random.default_rng(0).permutation(TRUE[SPLIT.test])
    first, second = outcome(cells), outcome(CellData(embedding=cells.embedding, codes=permuted))
    assert (first.table["test_macro_f1"] - second.table["test_macro_f1"]).abs().min() > 0.05
    columns = ["strategy", "rank", *(name for name in first.table if name.startswith("val_"))]
    pd.testing.assert_frame_equal(first.table[columns], second.table[columns])
    assert (first.best, first.recommendation) == (second.best, second.recommendation)


@pytest.mark.parametrize("fits", [ONE, SIX, SplitPlan(n_repeats=4).fits(TRUE, NAMES, classes=CLASSES)])
def test_predictions_of_test_cells_choose_nothing(fixed: Any, fits: list[Fit]) -> None:
    """In several fits a cell tests in one and trains in another, so what is spoilt is what is predicted of it then."""

    class Spoilt(fixed):  # type: ignore[misc,valid-type]
        spoil = False

        def unfitted(self) -> Spoilt:
            return Spoilt(self.name, self.codes, role=self.role)

        def fit(self, train: CellData, val: CellData, **kwargs: Any) -> None:
            super().fit(train, val, **kwargs)
            self.seen, self.n_trainable = 0, ord(self.name)  # time decides between equals

        def predict_proba(self, cells: CellData) -> np.ndarray:
            self.seen += 1
            found = super().predict_proba(cells)
            return np.roll(found, 1, axis=1) if self.seen == 2 and Spoilt.spoil else found

    def outcome(spoil: bool) -> Comparison:
        Spoilt.spoil = spoil
        return run(
            Spoilt("a", wrong(0.2)), Spoilt("b", wrong(0.21, 1)), Spoilt("c", wrong(0.25), role="baseline"), fits=fits
        )

    first, second = outcome(False), outcome(True)
    assert (first.table["test_macro_f1"] > second.table["test_macro_f1"] + 0.3).all()
    assert first.table["rank"].tolist() == second.table["rank"].tolist()
    assert (first.best, first.recommendation) == (second.best, second.recommendation)


def test_smaller_and_faster_break_ties(fixed: Any) -> None:
    small, large = fixed("small", TRUE), fixed("large", TRUE)
    small.fit = lambda *args, **kwargs: setattr(small, "n_trainable", 3)
    assert run(large, small).best == "small"


def test_baseline_is_ranked_and_never_best(fixed: Any) -> None:
    result = run(
        fixed("model", wrong(0.3)),
        fixed("genes", TRUE, role="baseline"),
        fixed("knn_frozen", wrong(0.02), role="baseline"),
    )
    assert result.table.set_index("strategy")["rank"].to_dict() == {"model": 3, "genes": 1, "knn_frozen": 2}
    assert result.table.set_index("strategy")["uses_encoder"].to_dict() == {
        "model": True,
        "genes": False,
        "knn_frozen": True,
    }
    assert result.best == "model"
    assert "not worth it here: the baseline genes" in result.recommendation
    assert set(result.differences.query("reference_role == 'baseline'")["reference"]) == {"genes"}


def test_one_failure_leaves_the_others(fixed: Any) -> None:
    with pytest.warns(UserWarning, match="'bad' failed and is left out: ValueError: no luck"):
        result = run(fixed("bad", TRUE, error=ValueError), fixed("good", wrong(0.2)))
    bad = result.table.set_index("strategy").loc["bad"]
    assert (bad["error"], bad["rank"], bad["n_fits"]) == ("ValueError: no luck", 2, 0)
    assert np.isnan(bad["val_macro_f1"])
    assert result.errors == {"bad": "ValueError: no luck"}
    assert list(result.fitted) == ["good"]
    assert result.table["n_trainable"].tolist() == [0, 7]
    assert "bad" not in set(result.differences["strategy"])


def test_a_failure_in_one_fit_is_a_failure(fixed: Any) -> None:
    strategies = fixed("bad", TRUE, error=ValueError, failing={2, 4}), fixed("good", wrong(0.2))
    with pytest.warns(UserWarning, match="'bad' failed"):
        result = run(*strategies, fits=SIX)
    bad = result.table.set_index("strategy").loc["bad"]
    assert (bad["rank"], bad["n_fits"]) == (2, 4)
    assert bad["error"] == "2 of 6 fits failed, first repeat 0 fold 2: ValueError: no luck"
    assert bad[[name for name in result.table if name.startswith(("val_", "test_"))]].isna().all()
    of_fits = result.folds.query("strategy == 'bad'")
    assert of_fits["val_macro_f1"].isna().tolist() == [False, False, True, False, True, False]
    assert (of_fits["error"] != "").tolist() == [False, False, True, False, True, False]
    assert result.best == "good" and "bad" not in result.recommendation
    assert set(result.fitted) == {"bad", "good"}  # it can predict, as the first fit did not fail


def test_baseline_alone_survives(fixed: Any) -> None:
    with pytest.warns(UserWarning, match="failed"):
        result = run(fixed("bad", TRUE, error=MemoryError), fixed("genes", TRUE, role="baseline"))
    assert result.best == "genes"
    assert result.recommendation.startswith("No strategy but the baseline genes finished")


def test_all_failing_raises_with_reasons_after_the_first_fit(fixed: Any) -> None:
    one = fixed("one", TRUE, error=ValueError)
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match=r"one: ValueError.*two: KeyErr"):
        run(one, fixed("two", TRUE, error=KeyError), fits=SIX)
    assert len(one.calls) == 1


def test_interrupt_passes(fixed: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(fixed("one", TRUE, error=KeyboardInterrupt))


def test_leakage_stands_beside_the_scores_by_group(fixed: Any) -> None:
    """A strategy that knows the donors it was trained on, and one that does not care."""

    class KnowsDonors(fixed):  # type: ignore[misc,valid-type]
        def unfitted(self) -> KnowsDonors:
            return KnowsDonors(self.name, self.codes)

        def predict_proba(self, cells: CellData) -> np.ndarray:
            index = cells.embedding[:, 0].astype(int)
            known = np.isin(donors[index], donors[self.calls[-1][0]])
            return np.eye(3, dtype=np.float32)[np.where(known, TRUE[index], self.codes[index])]

    donors = np.repeat([f"d{i}" for i in range(10)], 30)
    plan = SplitPlan(n_repeats=3)
    fits = plan.fits(TRUE, NAMES, classes=CLASSES, groups=donors)
    fits += plan.fits_by_cell(fits, TRUE, NAMES, classes=CLASSES)
    result = run(KnowsDonors("leaks", wrong(0.5)), fixed("honest", wrong(0.2), role="baseline"), fits=fits)
    table = result.table.set_index("strategy")
    assert (table["n_fits"] == 3).all()
    assert table["rank"].to_dict() == {"honest": 1, "leaks": 2}  # by the groups; by cells it would be the reverse
    assert result.folds["split_by"].tolist() == ["group"] * 6 + ["cell"] * 6
    rows = result.leakage.set_index(["strategy", "split"])
    assert set(rows.index) == {(name, part) for name in ("leaks", "honest") for part in ("val", "test")}
    for (name, part), row in rows.iterrows():
        assert row["by_group"] == pytest.approx(table.loc[name, f"{part}_macro_f1"])
        by_cell = result.folds.query("strategy == @name and split_by == 'cell'")[f"{part}_macro_f1"]
        assert row["by_cell"] == pytest.approx(by_cell.mean())
        assert row["gap"] == pytest.approx(row["by_cell"] - row["by_group"])
        assert row["low"] <= row["gap"] <= row["high"]
    assert rows.loc[("leaks", "test"), "by_cell"] == 1
    assert rows.loc[("leaks", "test"), "low"] > 0.2
    assert rows.loc[("honest", "test"), "low"] < 0 < rows.loc[("honest", "test"), "high"]
    assert set(result.history["repeat"]) == {0, 1, 2} and len(result.history) == 6  # those by group


def test_leakage_of_what_failed_is_open(fixed: Any) -> None:
    donors = np.repeat([f"d{i}" for i in range(10)], 30)
    plan = SplitPlan()
    fits = plan.fits(TRUE, NAMES, classes=CLASSES, groups=donors)
    fits += plan.fits_by_cell(fits, TRUE, NAMES, classes=CLASSES)
    with pytest.warns(UserWarning, match="'late' failed"):
        result = run(fixed("late", TRUE, error=ValueError, failing={1}), fixed("good", wrong(0.2)), fits=fits)
    assert result.errors == {}
    late = result.leakage.query("strategy == 'late'")
    assert late["by_group"].notna().all() and late[["by_cell", "gap", "low", "high"]].isna().all(axis=None)


def test_no_test_cells_and_absent_classes(fixed: Any) -> None:
    assignment = SPLIT.assignment.copy()
    assignment[(assignment == 1) & (TRUE == 2)] = 0
    assignment[assignment == 2] = -1
    fits = [Fit(0, 0, "cell", Split(assignment), 0), *SIX[:2]]
    models = fixed("one", TRUE), fixed("genes", wrong(0.3), role="baseline")
    result = run(*models, fits=fits[:1])
    row = result.table.iloc[0]
    assert row["auroc_note"] == "val: no cells of ; test: no cells"
    assert np.isnan(row["test_macro_f1"]) and set(result.differences["split"]) == {"val"}
    row = run(*models, fits=fits).table.iloc[0]
    assert row["auroc_note"] == "val: no cells of  (1 of 3 fits); test: no cells (1 of 3 fits)"
    assert row["val_auroc_ovr"] == 1


def test_bad_input(fixed: Any) -> None:
    with pytest.raises(ValueError, match="strategies is empty"):
        run()
    with pytest.raises(ValueError, match="fits is empty"):
        run(fixed("one", TRUE), fits=[])
    with pytest.raises(ValueError, match="different names, found one, one"):
        run(fixed("one", TRUE), fixed("one", TRUE))
    with pytest.raises(ValueError, match="300 label codes, repeat 0 fold 0 by cell 5"):
        run(fixed("one", TRUE), fits=[Fit(0, 0, "cell", Split(np.zeros(5, dtype=np.int8)), 0)])
