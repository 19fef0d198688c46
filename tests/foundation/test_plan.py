from __future__ import annotations

import numpy as np
import pytest

from scdlkit.foundation.folds import make_folds
from scdlkit.foundation.plan import SplitPlan
from scdlkit.foundation.splits import make_split

CODES = np.arange(400) % 4
NAMES = np.arange(400)
CLASSES = list("wxyz")
DONORS = np.repeat([f"d{i}" for i in range(10)], 40)


def test_one_fit_is_the_plain_split() -> None:
    (fit,) = SplitPlan(val_size=0.2, test_size=0.1, seed=7).fits(CODES, NAMES, classes=CLASSES)
    expected = make_split(CODES, NAMES, classes=CLASSES, val_size=0.2, test_size=0.1, seed=7)
    np.testing.assert_array_equal(fit.split.assignment, expected.assignment)
    assert (fit.repeat, fit.fold, fit.split_by, fit.seed) == (0, 0, "cell", 7)


@pytest.mark.parametrize("groups", [None, DONORS])
def test_repeats(groups: np.ndarray | None) -> None:
    plan = SplitPlan(n_repeats=5)
    fits = plan.fits(CODES, NAMES, classes=CLASSES, groups=groups)
    assert [(fit.repeat, fit.fold) for fit in fits] == [(r, 0) for r in range(5)]
    assert len({fit.split.assignment.tobytes() for fit in fits}) == 5
    assert len({fit.seed for fit in fits}) == 5 == plan.n_fits
    assert fits[0].seed == 42
    alone = SplitPlan().fits(CODES, NAMES, classes=CLASSES, groups=groups)
    np.testing.assert_array_equal(fits[0].split.assignment, alone[0].split.assignment)
    for fit in fits:
        assert set(CODES[fit.split.train]) == set(range(4))
        assert len(fit.split.test) == 60 if groups is None else len(fit.split.test) in (40, 80)


@pytest.mark.parametrize("groups", [None, DONORS])
def test_repeated_folds(groups: np.ndarray | None) -> None:
    fits = SplitPlan(n_repeats=3, cv=4).fits(CODES, NAMES, classes=CLASSES, groups=groups)
    assert [(fit.repeat, fit.fold) for fit in fits] == [(r, f) for r in range(3) for f in range(4)]
    for repeat in range(3):
        tests = np.concatenate([fit.split.test for fit in fits if fit.repeat == repeat])
        np.testing.assert_array_equal(np.sort(tests), np.arange(400))
    assert len({fit.split.assignment.tobytes() for fit in fits}) == 12
    expected = make_folds(CODES, NAMES, classes=CLASSES, cv=4, groups=groups)
    np.testing.assert_array_equal(fits[2].split.assignment, expected[2].assignment)


def test_splits_by_cell_are_as_large_as_those_by_group() -> None:
    donors = np.repeat(list("abc"), [240, 100, 60])
    plan = SplitPlan(n_repeats=2)
    by_group = plan.fits(CODES, NAMES, classes=CLASSES, groups=donors)
    by_cell = plan.fits_by_cell(by_group, CODES, NAMES, classes=CLASSES)
    for one, other in zip(by_group, by_cell, strict=True):
        assert (one.repeat, one.fold, one.seed) == (other.repeat, other.fold, other.seed)
        assert (one.split_by, other.split_by) == ("group", "cell")
        assert len(one.split.test) == len(other.split.test)
        assert len(one.split.val) == len(other.split.val)
        assert len(np.unique(donors[other.split.test])) == 3
    folds = SplitPlan(cv=3)
    by_group = folds.fits(CODES, NAMES, classes=CLASSES, groups=donors)
    by_cell = folds.fits_by_cell(by_group, CODES, NAMES, classes=CLASSES)
    assert [len(fit.split.test) for fit in by_cell] == [134, 133, 133]


def test_few_groups_have_few_splits() -> None:
    """Three donors and every class in each: six ways to say who trains, validates and tests."""
    donors = np.repeat(list("abc"), [134, 133, 133])
    plan = SplitPlan(n_repeats=8)
    fits = plan.fits(CODES, NAMES, classes=CLASSES, groups=donors)
    assert len({fit.split.assignment.tobytes() for fit in fits}) == 6
    assert [fit.split.assignment.tobytes() for fit in fits[6:]] == [fit.split.assignment.tobytes() for fit in fits[:2]]
    assert fits[6].seed != fits[0].seed
    (text,) = plan.warnings(fits, CODES, NAMES, CLASSES)
    assert "8 repeats share 6 different splits by whole groups" in text
    assert plan.warnings(fits[:6], CODES, NAMES, CLASSES) == []


def test_later_repeats_leave_no_class_out_of_training() -> None:
    """A class of one donor: that donor trains in every repeat."""
    codes = np.where((DONORS == "d3") & (CODES == 0), 4, CODES)
    plan = SplitPlan(n_repeats=6)
    fits = plan.fits(codes, NAMES, classes=[*CLASSES, "rare"], groups=DONORS)
    assert all((fit.split.assignment[DONORS == "d3"] == 0).all() for fit in fits)
    validation, test = plan.warnings(fits, codes, NAMES, [*CLASSES, "rare"])
    assert validation == "No validation cells of rare (6 of 6 fits): these classes occur in too few groups."
    assert "No test cells of rare (6 of 6 fits)" in test


def test_what_single_splits_say_is_said_of_one_fit() -> None:
    codes = np.where((DONORS == "d3") & (CODES == 0), 4, CODES)
    plan, classes = SplitPlan(), [*CLASSES, "rare"]
    fits = plan.fits(codes, NAMES, classes=classes, groups=DONORS)
    assert plan.warnings(fits, codes, NAMES, classes) == list(fits[0].split.warnings)
    fits = plan.fits(CODES, np.zeros(400), classes=CLASSES)
    assert plan.warnings(fits, CODES, np.zeros(400), CLASSES) == list(fits[0].split.warnings) != []


def test_small_classes_have_folds_without_test_cells() -> None:
    codes = np.append(CODES, [4] * 3)
    plan = SplitPlan(cv=5)
    fits = plan.fits(codes, np.arange(403), classes=[*CLASSES, "rare"])
    (text,) = plan.warnings(fits, codes, np.arange(403), [*CLASSES, "rare"])
    assert text == "No test cells of rare (2 of 5 fits): these classes have too few cells."


def test_problems_and_usable_classes() -> None:
    codes = np.append(CODES, [4] * 3)
    classes, donors = [*CLASSES, "rare"], np.append(DONORS, ["d0"] * 3)
    assert SplitPlan().problems(codes, classes) == SplitPlan(cv=3).problems(codes, classes) == []
    assert "rare (3); a class needs at least 4" in SplitPlan(cv=2).problems(codes, classes)[0]
    assert SplitPlan().problems(codes, classes, donors) == []
    assert "rare (1)" in SplitPlan(cv=3).problems(codes, classes, donors)[0]
    assert SplitPlan(cv=3).usable(codes, classes, donors).tolist() == [True] * 4 + [False]
    assert SplitPlan().usable(codes, classes, donors).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_repeats": 0}, "n_repeats must be an integer of at least 1, found 0"),
        ({"n_repeats": 2.0}, "n_repeats must be an integer"),
        ({"cv": 1}, "cv must be an integer of at least 2"),
        ({"cv": 2, "val_size": 0.6}, "below 1 - 1/cv"),
        ({"val_size": 0.6, "test_size": 0.4}, "must be below 1 to leave training cells"),
    ],
)
def test_bad_plans(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitPlan(**options)
