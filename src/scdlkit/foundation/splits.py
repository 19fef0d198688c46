"""Which cells train, which choose, which test: stratified by class, by whole groups on demand.

Cells are ordered by a keyed hash of their name, never by their position: the same cells in another order, or a file
written again, get the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._group_splits import TEST, TRAIN, VAL, Assignment, GroupTable, assign_groups, group_table
from ._split_checks import (
    UNLABELLED,
    absence_warnings,
    check_sizes,
    class_problems,
    group_problems,
    listing,
    name_warnings,
    trainable_classes,
)

SMALLEST_CLASS = 3  # one cell for each of train, validation and test
SMALLEST_GROUPS = 3
_NAMES = np.array(["train", "val", "test", "unlabelled"], dtype=object)


@dataclass(frozen=True)
class Split:
    """Part of every cell.

    Parameters
    ----------
    assignment
        int8 ``[n]``: 0 train, 1 validation, 2 test, -1 unlabelled.
    warnings
        What to know about the split.
    """

    assignment: np.ndarray
    warnings: tuple[str, ...] = ()

    @property
    def train(self) -> np.ndarray:
        """Positions of the training cells, ascending."""
        return np.flatnonzero(self.assignment == TRAIN)

    @property
    def val(self) -> np.ndarray:
        """Positions of the validation cells, ascending."""
        return np.flatnonzero(self.assignment == VAL)

    @property
    def test(self) -> np.ndarray:
        """Positions of the test cells, ascending."""
        return np.flatnonzero(self.assignment == TEST)

    @property
    def names(self) -> np.ndarray:
        """``"train"``, ``"val"``, ``"test"`` or ``"unlabelled"`` for every cell."""
        return _NAMES[self.assignment]

    def subset(self, index: np.ndarray) -> Split:
        """The split of the cells at ``index``, in that order."""
        return Split(self.assignment[index], self.warnings)


def make_split(
    codes: np.ndarray,
    cell_names: np.ndarray,
    *,
    classes: Sequence[str] | np.ndarray,
    groups: np.ndarray | None = None,
    val_size: float = 0.15,
    test_size: float = 0.15,
    seed: int = 42,
    repeat: int = 0,
) -> Split:
    """Split labelled cells into train, validation and test.

    Without groups every class is split on its own, within one cell of the sizes asked for and with at least one cell
    in each part. With groups, whole groups go to one part: of many seeded assignments, the one that has every class
    in training, as many classes as possible in validation and test, and sizes and class shares closest to the ones
    asked for.

    Parameters
    ----------
    codes
        int ``[n]``, positions in ``classes``, -1 for unlabelled cells.
    cell_names
        ``[n]``, names of the cells. Cells that share a name are told apart by position, with a warning.
    classes
        Names of the classes.
    groups
        ``[n]``, group of each cell (donor, study), or None.
    val_size, test_size
        Shares of the labelled cells.
    seed
        Another seed, another split.
    repeat
        Which of several splits under one seed. With groups, repeat ``r`` is the assignment that comes next after the
        ``r`` best ones; where there are not that many, it starts again with the best.

    Returns
    -------
    Split
        Part of every cell.

    Raises
    ------
    ValueError
        If :func:`split_feasibility` finds a problem, or a size is out of range.

    Example
    -------
    >>> split = make_split(codes, adata.obs_names, classes=["B", "T"], val_size=0.2, test_size=0.2)
    >>> codes[split.test]
    """
    codes, cell_names = np.asarray(codes), np.asarray(cell_names)
    if len(codes) != len(cell_names):
        raise ValueError(f"codes has {len(codes)} cells, cell_names {len(cell_names)}.")
    if problems := split_feasibility(codes, classes, groups, val_size=val_size, test_size=test_size, seed=seed):
        raise ValueError(" ".join(problems))
    warnings = []
    assignment = np.full(len(codes), UNLABELLED, dtype=np.int8)
    labelled = np.flatnonzero(codes >= 0)
    if groups is None:
        warnings += name_warnings(cell_names)
        assignment[labelled] = _stratified(
            codes[labelled], cell_names[labelled], val_size, test_size, repeat_seed(seed, repeat)
        )
    else:
        table = group_table(codes, np.asarray(groups), len(classes))
        found = _assignments(table, val_size, test_size, seed, n=repeat + 1)
        parts = found[repeat % len(found)].parts
        assignment[labelled] = parts[table.group_of]
        warnings += absence_warnings(codes, [assignment], classes, by_group=True)
    return Split(assignment, tuple(warnings))


def split_feasibility(
    codes: np.ndarray,
    classes: Sequence[str] | np.ndarray,
    groups: np.ndarray | None = None,
    *,
    val_size: float = 0.15,
    test_size: float = 0.15,
    seed: int = 42,
) -> list[str]:
    """What stands in the way of a split, as sentences; empty if nothing does. Parameters as in :func:`make_split`.

    Example
    -------
    >>> split_feasibility(np.array([0, 0, 0, 1]), ["B", "T"])[0]
    'Too few cells for train, validation and test: T (1); a class needs at least 3 labelled cells. ...'
    """
    check_sizes(val_size, test_size)
    codes = np.asarray(codes)
    if problems := class_problems(codes, classes, SMALLEST_CLASS):
        return problems
    if groups is None:
        return []
    if problems := group_problems(codes, groups):
        return problems
    table = group_table(codes, np.asarray(groups), len(classes))
    if len(table.counts) < SMALLEST_GROUPS:
        return [
            f"A split by groups needs at least {SMALLEST_GROUPS} groups with labelled cells, found "
            f"{len(table.counts)}: {listing(table.names)}."
        ]
    absent = _assignments(table, val_size, test_size, seed)[0].absent
    if len(absent):
        where = [f"{classes[int(code)]} ({table.n_groups(code)})" for code in absent]
        return [
            f"No split by whole groups has every class in training: left out would be {listing(where)} (groups "
            f"they occur in, of {len(table.counts)}). Use a finer group_key, merge or remove these classes, or drop "
            "them with small_classes='drop'."
        ]
    return []


def usable_classes(
    codes: np.ndarray,
    classes: Sequence[str] | np.ndarray,
    groups: np.ndarray | None = None,
    *,
    val_size: float = 0.15,
    test_size: float = 0.15,
    seed: int = 42,
) -> np.ndarray:
    """Classes that can be split, bool ``[classes]``; the others have to be dropped or merged.

    Too small classes are not usable; with groups neither are those which the best assignment of groups leaves out of
    training. Parameters as in :func:`make_split`.

    Example
    -------
    >>> usable_classes(np.array([0, 0, 0, 1]), ["B", "T"])
    array([ True, False])
    """
    check_sizes(val_size, test_size)

    def left_out(table: GroupTable) -> np.ndarray:
        return _assignments(table, val_size, test_size, seed)[0].absent

    return trainable_classes(
        codes, len(classes), groups, smallest=SMALLEST_CLASS, fewest_groups=SMALLEST_GROUPS, left_out=left_out
    )


def repeat_seed(seed: int, repeat: int, fold: int = 0) -> int:
    """Seed of one of several fits, below 2**32; the first has the seed itself."""
    if repeat == fold == 0:
        return seed
    digest = hashlib.blake2b(f"{seed} {repeat} {fold}".encode(), digest_size=4, key=b"scdlkit fit").digest()
    return int.from_bytes(digest, "little")


def name_hashes(cell_names: np.ndarray, seed: int) -> np.ndarray:
    """Keyed hash of every name, uint64 ``[n]``: a random order of cells that depends on names and seed alone."""
    key = f"scdlkit split {seed}".encode()
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8, key=key).digest() for name in cell_names)
    return np.frombuffer(digests, dtype="<u8")


def _stratified(codes: np.ndarray, cell_names: np.ndarray, val_size: float, test_size: float, seed: int) -> np.ndarray:
    present, counts = np.unique(codes, return_counts=True)
    n_val = round_to_total(counts * val_size, np.zeros(len(counts)))
    n_test = round_to_total(counts * test_size, n_val - counts * val_size)
    for index, count in enumerate(counts):  # large shares of a small class can leave nothing to train on
        while n_val[index] + n_test[index] >= count:
            over_val, over_test = n_val[index] - count * val_size, n_test[index] - count * test_size
            if n_test[index] > 1 and (over_test >= over_val or n_val[index] == 1):
                n_test[index] -= 1
            else:
                n_val[index] -= 1
    order = np.argsort(name_hashes(cell_names, seed), kind="stable")
    parts = np.full(len(codes), TRAIN, dtype=np.int8)
    for index, code in enumerate(present):
        members = order[codes[order] == code]
        parts[members[: n_val[index]]] = VAL
        parts[members[n_val[index] : n_val[index] + n_test[index]]] = TEST
    return parts


def round_to_total(ideal: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Round down or up so that the total is right; largest remainders go up first, and nothing is below 1."""
    sizes = np.maximum(np.floor(ideal), 1).astype(np.int64)
    missing = int(round(ideal.sum())) - int(sizes.sum())
    remainder = np.where(sizes < ideal, ideal - np.floor(ideal), -1.0)
    order = np.lexsort((penalty, -np.round(remainder, 9)))  # among equals, those that lost no cell to the other part
    for index in order[: max(missing, 0)]:
        sizes[index] += remainder[index] > 0
    return sizes


def _assignments(table: GroupTable, val_size: float, test_size: float, seed: int, n: int = 1) -> list[Assignment]:
    return assign_groups(table.counts, val_size=val_size, test_size=test_size, seed=[seed, 1], n=n)
