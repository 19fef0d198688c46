from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation.splits import make_split, name_hashes, split_feasibility, usable_classes

shares = st.floats(0.01, 0.45)
seeds = st.integers(0, 2**31)


@st.composite
def labelled_cells(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    counts = draw(st.lists(st.integers(3, 40), min_size=2, max_size=8))
    codes = np.repeat(np.arange(-1, len(counts)), [draw(st.integers(0, 10)), *counts])
    codes = np.random.default_rng(draw(seeds)).permutation(codes)
    return codes, np.array([f"cell{i}" for i in range(len(codes))]), [f"class{i}" for i in range(len(counts))]


@settings(max_examples=100, deadline=None)
@given(labelled_cells(), shares, shares, seeds)
def test_stratified(cells: tuple, val_size: float, test_size: float, seed: int) -> None:
    codes, names, classes = cells
    split = make_split(codes, names, classes=classes, val_size=val_size, test_size=test_size, seed=seed)
    parts = [split.train, split.val, split.test]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.flatnonzero(codes >= 0))
    np.testing.assert_array_equal(split.names == "unlabelled", codes == -1)
    for part, size in ((split.val, val_size), (split.test, test_size)):
        found = np.bincount(codes[part], minlength=len(classes))
        ideal = np.bincount(codes[codes >= 0], minlength=len(classes)) * size
        assert (np.abs(found - ideal) <= 1).all()
        assert found.min() >= 1
    assert np.bincount(codes[split.train], minlength=len(classes)).min() >= 1


@settings(max_examples=40, deadline=None)
@given(labelled_cells(), seeds)
def test_independent_of_cell_order(cells: tuple, seed: int) -> None:
    codes, names, classes = cells
    order = np.random.default_rng(seed + 1).permutation(len(codes))
    split = make_split(codes, names, classes=classes, seed=seed)
    shuffled = make_split(codes[order], names[order], classes=classes, seed=seed)
    np.testing.assert_array_equal(split.subset(order).assignment, shuffled.assignment)


@st.composite
def grouped_cells(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(draw(seeds))
    n_groups, n_classes = draw(st.integers(3, 9)), draw(st.integers(2, 5))
    counts = rng.poisson(draw(st.sampled_from([1.0, 3.0, 10.0])), size=(n_groups, n_classes))
    counts[rng.integers(n_groups), :] += 3  # every class is large enough
    codes = np.repeat(np.tile(np.arange(n_classes), n_groups), counts.ravel())
    groups = np.repeat(np.repeat(np.arange(n_groups), n_classes), counts.ravel()).astype(object)
    order = rng.permutation(len(codes))
    names = np.array([f"cell{i}" for i in range(len(codes))])
    return codes[order], names, groups[order], [f"class{i}" for i in range(n_classes)]


@settings(max_examples=40, deadline=None)
@given(grouped_cells(), seeds)
def test_groups_stay_whole(cells: tuple, seed: int) -> None:
    codes, names, groups, classes = cells
    problems = split_feasibility(codes, classes, groups, seed=seed)
    if problems:
        with pytest.raises(ValueError, match=problems[0][:30]):
            make_split(codes, names, classes=classes, groups=groups, seed=seed)
        return
    split = make_split(codes, names, classes=classes, groups=groups, seed=seed)
    assert all(len(np.unique(split.assignment[groups == group])) == 1 for group in np.unique(groups))
    assert min(len(split.train), len(split.val), len(split.test)) > 0
    assert set(codes[split.train]) == set(range(len(classes)))
    absent = [name for code, name in enumerate(classes) if (codes[split.val] != code).all()]
    assert all(any("validation" in text and name in text for text in split.warnings) for name in absent)
    order = np.random.default_rng(seed).permutation(len(codes))
    shuffled = make_split(codes[order], names[order], classes=classes, groups=groups[order], seed=seed)
    np.testing.assert_array_equal(split.assignment[order], shuffled.assignment)


@settings(max_examples=40, deadline=None)
@given(grouped_cells(), seeds)
def test_usable_classes_can_be_split(cells: tuple, seed: int) -> None:
    codes, names, groups, classes = cells
    usable = usable_classes(codes, classes, groups, seed=seed)
    if usable.sum() < 2:
        return
    new_codes = np.where(usable, np.cumsum(usable) - 1, -1)[codes]
    kept = [name for name, use in zip(classes, usable, strict=True) if use]
    if len(np.unique(groups[new_codes >= 0])) >= 3:
        assert split_feasibility(new_codes, kept, groups, seed=seed) == []


def test_seeds_differ_and_repeat() -> None:
    codes, names = np.repeat([0, 1], 100), np.arange(200)
    one, again, two = (make_split(codes, names, classes=["a", "b"], seed=seed).assignment for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != two).any()
    assert len(np.unique(name_hashes(names, 0))) == 200


def test_sizes_add_up_over_many_small_classes() -> None:
    codes = np.repeat(np.arange(40), 10)
    split = make_split(codes, np.arange(400), classes=list(map(str, range(40))))
    assert (len(split.val), len(split.test)) == (60, 60)
    assert np.bincount(codes[split.train]).tolist() == [7] * 40


def test_smallest_class() -> None:
    codes = np.array([0, 0, 0, 1, 1, 1])
    split = make_split(codes, np.arange(6), classes=["a", "b"], val_size=0.4, test_size=0.4)
    assert sorted(split.assignment[:3]) == sorted(split.assignment[3:]) == [0, 1, 2]
    small = np.append(codes, [2, 2])
    with pytest.raises(ValueError, match=r"NK/T \(2\); a class needs at least 3"):
        make_split(small, np.arange(8), classes=["a", "b", "NK/T"])
    assert usable_classes(small, ["a", "b", "NK/T"]).tolist() == [True, True, False]


def test_one_class_or_none() -> None:
    assert "found 1" in split_feasibility(np.zeros(5, dtype=int), ["a"])[0]
    assert "a (0), b (0)" in split_feasibility(np.full(5, -1), ["a", "b"])[0]
    assert "a (0), b (0)" in split_feasibility(np.array([], dtype=int), ["a", "b"])[0]


def test_repeated_names_are_reported() -> None:
    split = make_split(np.repeat([0, 1], 5), np.array(["x"] * 10), classes=["a", "b"])
    assert "9 cell names are not unique" in split.warnings[0]


def test_too_few_groups_and_missing_groups() -> None:
    codes, names = np.tile([0, 1], 6), np.arange(12)
    with pytest.raises(ValueError, match="at least 3 groups with labelled cells, found 2: a, b"):
        make_split(codes, names, classes=["x", "y"], groups=np.repeat(["a", "b"], 6))
    groups = np.repeat(np.array(["a", "b", "c", None], dtype=object), 3)
    with pytest.raises(ValueError, match="3 labelled cells have no group"):
        make_split(codes, names, classes=["x", "y"], groups=groups)
    unlabelled = np.where(groups == np.array(None), -1, codes)
    split = make_split(unlabelled, names, classes=["x", "y"], groups=groups)
    assert (split.names[9:] == "unlabelled").all()


def test_class_of_one_group_trains() -> None:
    groups = np.repeat(np.array(list("abcde")), 20)
    codes = np.tile([0, 1], 50)
    codes[:5] = 2  # in group a alone
    for seed in range(5):
        split = make_split(codes, np.arange(100), classes=["x", "y", "rare"], groups=groups, seed=seed)
        assert (split.assignment[:20] == 0).all()
        assert len([text for text in split.warnings if "rare" in text]) == 2


def test_impossible_groups_are_refused_or_dropped() -> None:
    groups = np.repeat(np.array(list("abc")), 20)
    codes = np.repeat([0, 1, 2, 0, 1, 2], 10)
    codes = np.where(np.arange(60) % 4 == 0, 3, codes)  # "d" everywhere, the others in one or two groups each
    with pytest.raises(ValueError, match="whole groups"):
        make_split(codes, np.arange(60), classes=["x", "y", "z", "d"], groups=groups)
    usable = usable_classes(codes, ["x", "y", "z", "d"], groups)
    assert usable[3]
    assert usable.sum() == 3


@pytest.mark.parametrize(("name", "value"), [("val_size", 0.0), ("test_size", 1.0), ("val_size", float("nan"))])
def test_bad_sizes(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        make_split(np.repeat([0, 1], 5), np.arange(10), classes=["a", "b"], **{name: value})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="leave training cells"):
        make_split(np.repeat([0, 1], 5), np.arange(10), classes=["a", "b"], val_size=0.5, test_size=0.5)
    with pytest.raises(ValueError, match="cell_names 9"):
        make_split(np.repeat([0, 1], 5), np.arange(9), classes=["a", "b"])
    with pytest.raises(ValueError, match="groups has 9"):
        make_split(np.repeat([0, 1], 5), np.arange(10), classes=["a", "b"], groups=np.arange(9))
    with pytest.raises(ValueError, match="found 0 to 2"):
        make_split(np.array([0, 1, 2]), np.arange(3), classes=["a", "b"])
