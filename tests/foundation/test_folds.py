from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from scdlkit.foundation.folds import fewest_groups, fold_feasibility, make_folds, smallest_class, usable_in_folds

seeds = st.integers(0, 2**31)


@st.composite
def labelled_cells(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    counts = draw(st.lists(st.integers(4, 40), min_size=2, max_size=8))
    codes = np.repeat(np.arange(-1, len(counts)), [draw(st.integers(0, 10)), *counts])
    codes = np.random.default_rng(draw(seeds)).permutation(codes)
    return codes, np.array([f"cell{i}" for i in range(len(codes))]), [f"class{i}" for i in range(len(counts))]


@settings(max_examples=60, deadline=None)
@given(labelled_cells(), st.integers(2, 7), st.floats(0.01, 0.45), seeds, st.integers(0, 3))
def test_every_cell_tests_once_and_classes_are_spread(
    cells: tuple, cv: int, val_size: float, seed: int, repeat: int
) -> None:
    codes, names, classes = cells
    folds = make_folds(codes, names, classes=classes, cv=cv, val_size=val_size, seed=seed, repeat=repeat)
    labelled = np.flatnonzero(codes >= 0)
    assert len(folds) == cv
    np.testing.assert_array_equal(np.sort(np.concatenate([split.test for split in folds])), labelled)
    assert np.ptp([len(split.test) for split in folds]) <= 1
    counts = np.bincount(codes[labelled], minlength=len(classes))
    for split in folds:
        parts = [split.train, split.val, split.test]
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), labelled)
        train, val, test = (np.bincount(codes[part], minlength=len(classes)) for part in parts)
        assert (np.abs(test - counts / cv) < 1).all()
        assert train.min() >= 1
        assert val.min() >= 1
        assert ((np.abs(val - counts * val_size) <= 1) | (train == 1)).all()


@settings(max_examples=30, deadline=None)
@given(labelled_cells(), st.integers(2, 6), seeds)
def test_independent_of_cell_order(cells: tuple, cv: int, seed: int) -> None:
    codes, names, classes = cells
    order = np.random.default_rng(seed + 1).permutation(len(codes))
    folds = make_folds(codes, names, classes=classes, cv=cv, seed=seed)
    shuffled = make_folds(codes[order], names[order], classes=classes, cv=cv, seed=seed)
    for one, other in zip(folds, shuffled, strict=True):
        np.testing.assert_array_equal(one.assignment[order], other.assignment)


def test_as_even_as_scikit_learn() -> None:
    codes = np.random.default_rng(0).permutation(np.repeat(np.arange(6), [5, 7, 11, 30, 31, 60]))
    ours = make_folds(codes, np.arange(len(codes)), classes=list("abcdef"), cv=5)
    theirs = [test for _, test in StratifiedKFold(5).split(codes, codes)]
    for code in range(6):
        mine = sorted((codes[split.test] == code).sum() for split in ours)
        assert mine == sorted((codes[test] == code).sum() for test in theirs)


def test_repeats_and_seeds_differ() -> None:
    codes, names = np.repeat([0, 1], 50), np.arange(100)

    def tests_of(**options: int) -> list[bytes]:
        return [split.assignment.tobytes() for split in make_folds(codes, names, classes=["a", "b"], cv=3, **options)]

    assert tests_of(seed=1) == tests_of(seed=1)
    assert not set(tests_of(seed=1)) & set(tests_of(seed=2))
    assert not set(tests_of(seed=1)) & set(tests_of(seed=1, repeat=1))


@st.composite
def grouped_cells(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(draw(seeds))
    n_groups, n_classes = draw(st.integers(2, 9)), draw(st.integers(2, 5))
    counts = rng.poisson(draw(st.sampled_from([1.0, 3.0, 20.0])), size=(n_groups, n_classes))
    counts[rng.choice(n_groups, 2, replace=False), :] += 3
    codes = np.repeat(np.tile(np.arange(n_classes), n_groups), counts.ravel())
    groups = np.repeat(np.repeat(np.arange(n_groups), n_classes), counts.ravel()).astype(object)
    order = rng.permutation(len(codes))
    names = np.array([f"cell{i}" for i in range(len(codes))])
    return codes[order], names, groups[order], [f"class{i}" for i in range(n_classes)]


@settings(max_examples=25, deadline=None)
@given(grouped_cells(), st.integers(2, 5), seeds)
def test_groups_stay_whole(cells: tuple, cv: int, seed: int) -> None:
    codes, names, groups, classes = cells
    problems = fold_feasibility(codes, classes, groups, cv=cv, seed=seed)
    if problems:
        with pytest.raises(ValueError, match=problems[0][:20]):
            make_folds(codes, names, classes=classes, cv=cv, groups=groups, seed=seed)
        return
    order = np.random.default_rng(seed).permutation(len(codes))
    for repeat in range(2):
        folds = make_folds(codes, names, classes=classes, cv=cv, groups=groups, seed=seed, repeat=repeat)
        np.testing.assert_array_equal(np.sort(np.concatenate([split.test for split in folds])), np.arange(len(codes)))
        shuffled = make_folds(
            codes[order], names[order], classes=classes, cv=cv, groups=groups[order], seed=seed, repeat=repeat
        )
        for split, other in zip(folds, shuffled, strict=True):
            assert all(len(np.unique(split.assignment[groups == group])) == 1 for group in np.unique(groups))
            assert min(len(split.train), len(split.val), len(split.test)) > 0
            assert set(codes[split.train]) == set(range(len(classes)))
            np.testing.assert_array_equal(split.assignment[order], other.assignment)


def test_refused_is_what_cannot_be() -> None:
    """Brute force over small tables: of all divisions and all choices of validation groups, is there one that works?"""
    rng = np.random.default_rng(0)
    outcomes: Counter[bool] = Counter()
    while outcomes.total() < 40:
        n_groups, n_classes, cv = (int(rng.integers(*bounds)) for bounds in ((3, 6), (2, 5), (2, 4)))
        present = rng.random((n_groups, n_classes)) < 0.75
        counts = present * rng.integers(4, 40, size=present.shape)
        if not present.any(0).all() or not present.any(1).all() or n_groups < fewest_groups(cv):
            continue
        possible = any(_works(present, fold_of, cv) for fold_of in product(range(cv), repeat=n_groups))
        codes = np.repeat(np.tile(np.arange(n_classes), n_groups), counts.ravel())
        groups = np.repeat(np.repeat(np.arange(n_groups), n_classes), counts.ravel()).astype(str)
        assert (fold_feasibility(codes, list("abcde")[:n_classes], groups, cv=cv) == []) == possible
        outcomes[possible] += 1
    assert min(outcomes.values()) >= 5


def _works(present: np.ndarray, fold_of: tuple[int, ...], cv: int) -> bool:
    if len(set(fold_of)) < cv:
        return False
    for fold in range(cv):
        rest = [group for group, of in enumerate(fold_of) if of != fold]
        choices = product([False, True], repeat=len(rest))
        trained = [[g for g, held in zip(rest, val, strict=True) if not held] for val in choices if any(val)]
        if not any(chosen and present[chosen].any(0).all() for chosen in trained):
            return False
    return True


@settings(max_examples=15, deadline=None)
@given(grouped_cells(), st.integers(2, 4), seeds)
def test_usable_classes_can_be_divided(cells: tuple, cv: int, seed: int) -> None:
    codes, _, groups, classes = cells
    usable = usable_in_folds(codes, classes, groups, cv=cv, seed=seed)
    if usable.sum() < 2:
        return
    new_codes = np.where(usable, np.cumsum(usable) - 1, -1)[codes]
    kept = [name for name, use in zip(classes, usable, strict=True) if use]
    if len(np.unique(groups[new_codes >= 0])) >= fewest_groups(cv):
        assert fold_feasibility(new_codes, kept, groups, cv=cv, seed=seed) == []


def test_leave_one_donor_out() -> None:
    groups = np.repeat(np.array(list("abcdef")), 20)
    codes = np.tile([0, 1], 60)
    folds = make_folds(codes, np.arange(120), classes=["x", "y"], cv=6, groups=groups)
    assert Counter(groups[split.test][0] for split in folds) == dict.fromkeys("abcdef", 1)
    assert all(len(split.test) == 20 and len(split.val) == 20 for split in folds)


def test_a_large_group_does_not_leave_one_group_alone() -> None:
    """With two folds and one group that holds half of the cells, training and validation need two groups each time."""
    groups = np.repeat(np.array(list("abcd")), [300, 10, 10, 10])
    folds = make_folds(np.arange(330) % 2, np.arange(330), classes=["x", "y"], cv=2, groups=groups)
    assert sorted(len(np.unique(groups[split.test])) for split in folds) == [2, 2]


def test_too_few_groups_or_cells() -> None:
    codes, names, groups = np.tile([0, 1], 6), np.arange(12), np.repeat(list("abc"), 4)
    with pytest.raises(
        ValueError, match="10 folds by groups need at least 10 groups with labelled cells, found 3: a, b"
    ):
        make_folds(codes, names, classes=["x", "y"], groups=groups, cv=10)
    with pytest.raises(ValueError, match="2 folds by groups need at least 4 groups"):
        make_folds(codes, names, classes=["x", "y"], groups=groups, cv=2)
    only = np.where((groups == "a") & (codes == 1), 2, codes)  # class 2 in group a alone
    assert fold_feasibility(np.repeat(only, 2), ["x", "y", "rare"], np.repeat(groups, 2), cv=3) != []
    with pytest.raises(ValueError, match=r"left out would be .*rare \(1\).* of 3\).*finer group_key"):
        make_folds(np.repeat(only, 2), np.arange(24), classes=["x", "y", "rare"], groups=np.repeat(groups, 2), cv=3)
    small = np.array([0] * 9 + [1] * 3)
    assert make_folds(small, np.arange(12), classes=["x", "y"], cv=5)
    with pytest.raises(ValueError, match=r"y \(3\); a class needs at least 4 labelled cells"):
        make_folds(small, np.arange(12), classes=["x", "y"], cv=2)
    assert usable_in_folds(small, ["x", "y"], cv=2).tolist() == [True, False]
    assert (smallest_class(2), smallest_class(3)) == (4, 3)
    with pytest.raises(ValueError, match="2 labelled cells have no group"):
        make_folds(codes, names, classes=["x", "y"], groups=np.array(["a", None] * 2 + ["b"] * 8, dtype=object), cv=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cv": 1}, "cv must be an integer of at least 2, found 1"),
        ({"cv": True}, "cv must be an integer"),
        ({"cv": 2.5}, "cv must be an integer"),
        ({"cv": 2, "val_size": 0.5}, "val_size must be above 0 and below 1 - 1/cv"),
        ({"cv": 3, "cell_names": np.arange(3)}, "codes has 20 cells, cell_names 3"),
        ({"cv": 3, "groups": np.arange(3)}, "groups has 3 cells, codes 20"),
        ({"cv": 3, "classes": ["a"]}, "codes must be in"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    arguments = {"cell_names": np.arange(20), "classes": ["a", "b"], **options}
    with pytest.raises(ValueError, match=message):
        make_folds(np.arange(20) % 2, **arguments)
