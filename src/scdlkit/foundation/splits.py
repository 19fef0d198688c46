"""Which cells train, which choose, which test: stratified by class, by whole groups on demand.

Cells are ordered by a keyed hash of their name, never by their position: the same cells in another order, or a file
written again, get the same split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

TRAIN, VAL, TEST, UNLABELLED = 0, 1, 2, -1
SMALLEST_CLASS = 3  # one cell for each of train, validation and test
SMALLEST_GROUPS = 3
_NAMES = np.array(["train", "val", "test", "unlabelled"], dtype=object)
_PERMUTATIONS = (100, 1000)  # at least and at most
_PERMUTATION_WORK = 20_000_000  # entries of groups x classes looked at in all


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
        n_repeated = len(cell_names) - len(np.unique(cell_names.astype(str)))
        if n_repeated:
            warnings.append(f"{n_repeated} cell names are not unique; the split of these cells depends on their order.")
        assignment[labelled] = _stratified(codes[labelled], cell_names[labelled], val_size, test_size, seed)
    else:
        table = _group_table(codes, np.asarray(groups), len(classes))
        parts = _assign_groups(table, val_size, test_size, seed).parts
        assignment[labelled] = parts[table.group_of]
        for part, word in ((VAL, "validation"), (TEST, "test")):
            absent = table.counts[parts == part].sum(0) == 0
            if absent.any():
                names = _listing([str(label) for label in np.asarray(classes, dtype=object)[absent]])
                warnings.append(f"No {word} cells of {names}: these classes occur in too few groups.")
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
    _check_sizes(val_size, test_size)
    codes = np.asarray(codes)
    if len(codes) and (codes.min() < UNLABELLED or codes.max() >= len(classes)):
        raise ValueError(f"codes must be in [-1, {len(classes)}), found {codes.min()} to {codes.max()}.")
    counts = np.bincount(codes[codes >= 0], minlength=len(classes))
    if len(classes) < 2:
        return [f"At least two classes are needed to learn labels, found {len(classes)}."]
    labels = [str(label) for label in classes]
    small = [f"{labels[code]} ({counts[code]})" for code in np.flatnonzero(counts < SMALLEST_CLASS)]
    if small:
        return [
            f"Too few cells for train, validation and test: {_listing(small)}; a class needs at least "
            f"{SMALLEST_CLASS} labelled cells. Merge or remove these classes, or drop them with small_classes='drop'."
        ]
    if groups is None:
        return []
    groups = np.asarray(groups)
    if len(groups) != len(codes):
        raise ValueError(f"groups has {len(groups)} cells, codes {len(codes)}.")
    without = int((pd.isna(groups) & (codes >= 0)).sum())
    if without:
        return [f"{without} labelled cells have no group; give them one or leave out group_key."]
    table = _group_table(codes, groups, len(classes))
    if len(table.counts) < SMALLEST_GROUPS:
        return [
            f"A split by groups needs at least {SMALLEST_GROUPS} groups with labelled cells, found "
            f"{len(table.counts)}: {_listing(table.names)}."
        ]
    absent = _assign_groups(table, val_size, test_size, seed).absent
    if len(absent):
        where = [f"{labels[code]} ({_n_groups(table, code)})" for code in absent]
        return [
            f"No split by whole groups has every class in training: left out would be {_listing(where)} (groups "
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
    _check_sizes(val_size, test_size)
    codes = np.asarray(codes)
    usable = np.bincount(codes[codes >= 0], minlength=len(classes)) >= SMALLEST_CLASS
    if groups is None:
        return usable
    kept = np.where((codes >= 0) & usable[codes] & ~pd.isna(np.asarray(groups)), codes, UNLABELLED)
    usable &= np.bincount(kept[kept >= 0], minlength=len(classes)) >= SMALLEST_CLASS
    # Dropping classes changes what the best assignment is, so drop until nothing is left out.
    while usable.any():
        kept = np.where((kept >= 0) & usable[kept], kept, UNLABELLED)
        table = _group_table(kept, np.asarray(groups), len(classes))
        if len(table.counts) < SMALLEST_GROUPS:
            break
        absent = [code for code in _assign_groups(table, val_size, test_size, seed).absent if usable[code]]
        if not absent:
            break
        usable[absent] = False
    return usable


def name_hashes(cell_names: np.ndarray, seed: int) -> np.ndarray:
    """Keyed hash of every name, uint64 ``[n]``: a random order of cells that depends on names and seed alone."""
    key = f"scdlkit split {seed}".encode()
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8, key=key).digest() for name in cell_names)
    return np.frombuffer(digests, dtype="<u8")


def _stratified(codes: np.ndarray, cell_names: np.ndarray, val_size: float, test_size: float, seed: int) -> np.ndarray:
    present, counts = np.unique(codes, return_counts=True)
    n_val = _round_to_total(counts * val_size, np.zeros(len(counts)))
    n_test = _round_to_total(counts * test_size, n_val - counts * val_size)
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


def _round_to_total(ideal: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Round down or up so that the total is right; largest remainders go up first, and nothing is below 1."""
    sizes = np.maximum(np.floor(ideal), 1).astype(np.int64)
    missing = int(round(ideal.sum())) - int(sizes.sum())
    remainder = np.where(sizes < ideal, ideal - np.floor(ideal), -1.0)
    order = np.lexsort((penalty, -np.round(remainder, 9)))  # among equals, those that lost no cell to the other part
    for index in order[: max(missing, 0)]:
        sizes[index] += remainder[index] > 0
    return sizes


class _GroupTable(NamedTuple):
    names: list[str]
    group_of: np.ndarray  # group of each labelled cell
    counts: np.ndarray  # [groups, classes]


class _Groups(NamedTuple):
    parts: np.ndarray  # [groups]
    absent: np.ndarray  # classes without training cells


def _group_table(codes: np.ndarray, groups: np.ndarray, n_classes: int) -> _GroupTable:
    labelled = codes >= 0
    names, group_of = np.unique(groups[labelled].astype(str), return_inverse=True)
    counts = np.zeros((len(names), n_classes), dtype=np.int64)
    np.add.at(counts, (group_of, codes[labelled]), 1)
    return _GroupTable(names.tolist(), group_of, counts)


def _assign_groups(table: _GroupTable, val_size: float, test_size: float, seed: int) -> _Groups:
    """Best of many seeded orders of the groups, each filling validation, then test, then training."""
    counts = table.counts
    n_groups, total, per_class = len(counts), counts.sum(), counts.sum(0)
    present = per_class > 0
    share = np.array([1 - val_size - test_size, val_size, test_size])
    only_here = ((counts > 0) & ((counts > 0).sum(0) == 1)).any(1)  # the one group of a class has to train
    trials = int(np.clip(_PERMUTATION_WORK // counts.size, *_PERMUTATIONS))
    keys = np.random.default_rng([seed, 1]).random((trials, n_groups))
    keys[::2] += only_here  # every other order has them last
    order = keys.argsort(1)
    place = order.argsort(1)
    sizes = counts.sum(1)[order].cumsum(1)
    n_val = _closest_prefix(sizes, np.full(trials, val_size * total), np.zeros(trials), n_groups - 2)
    reached = np.take_along_axis(sizes, n_val[:, None] - 1, 1)[:, 0]
    n_held_out = _closest_prefix(sizes, reached + test_size * total, n_val, n_groups - 1)
    parts = np.where(place < n_val[:, None], VAL, np.where(place < n_held_out[:, None], TEST, TRAIN))
    found = np.stack([(parts == part) @ counts.astype(np.float64) for part in (TRAIN, VAL, TEST)], axis=1)
    absent = (found[:, :, present] == 0).sum(2)
    size_error = np.abs(found.sum(2) / total - share).sum(1)
    class_error = np.abs(found / np.maximum(per_class, 1) - share[:, None])[:, :, present].mean((1, 2))
    best = np.lexsort((np.round(size_error + class_error, 9), absent[:, 1:].sum(1), absent[:, 0]))[0]
    return _Groups(parts[best].astype(np.int8), np.flatnonzero(present & (found[best, 0] == 0)))


def _closest_prefix(sizes: np.ndarray, wanted: np.ndarray, above: np.ndarray, most: int) -> np.ndarray:
    """How many of the first groups come closest to the wanted number of cells, ``above + 1`` to ``most``, by trial."""
    distance = np.abs(sizes[:, :most] - wanted[:, None])
    distance[np.arange(most) < above[:, None]] = np.inf
    return distance.argmin(1) + 1


def _check_sizes(val_size: float, test_size: float) -> None:
    for name, size in (("val_size", val_size), ("test_size", test_size)):
        if not 0 < size < 1:
            raise ValueError(f"{name} must be above 0 and below 1, found {size}.")
    if val_size + test_size >= 1:
        raise ValueError(f"val_size + test_size must be below 1 to leave training cells, found {val_size + test_size}.")


def _n_groups(table: _GroupTable, code: int) -> int:
    return int((table.counts[:, code] > 0).sum())


def _listing(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
