"""Whole groups of cells to parts of a split, or to folds: the best of many seeded orders of the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TRAIN, VAL, TEST = 0, 1, 2
_PERMUTATIONS = (100, 1000)  # at least and at most
_PERMUTATION_WORK = 20_000_000  # entries of groups x classes looked at in all


class GroupTable(NamedTuple):
    """Labelled cells by group and class."""

    names: list[str]
    group_of: np.ndarray  # group of each labelled cell
    counts: np.ndarray  # [groups, classes]

    def n_groups(self, code: int) -> int:
        """Number of groups a class occurs in."""
        return int((self.counts[:, code] > 0).sum())


class Assignment(NamedTuple):
    """Part of every group."""

    parts: np.ndarray  # int8 [groups]
    absent: np.ndarray  # classes without training cells


def group_table(codes: np.ndarray, groups: np.ndarray, n_classes: int) -> GroupTable:
    """Count the labelled cells of each group and class."""
    labelled = codes >= 0
    names, group_of = np.unique(groups[labelled].astype(str), return_inverse=True)
    counts = np.zeros((len(names), n_classes), dtype=np.int64)
    np.add.at(counts, (group_of, codes[labelled]), 1)
    return GroupTable(names.tolist(), group_of, counts)


def assign_groups(
    counts: np.ndarray, *, val_size: float, test_size: float, seed: int | Sequence[int], n: int = 1
) -> list[Assignment]:
    """The ``n`` best different assignments to training, validation and test, fewer if there are fewer.

    Every order of the groups fills validation, then test, then training. Best is: every class in training, as many
    classes as possible in validation and test, sizes and class shares closest to the ones asked for. From the second
    on, only assignments with every class in training count.

    Parameters
    ----------
    counts
        Cells ``[groups, classes]``.
    val_size, test_size
        Shares of all these cells. A ``test_size`` of 0 leaves the test empty.
    seed
        Of the orders.
    n
        How many.
    """
    n_groups, total, per_class = len(counts), counts.sum(), counts.sum(0)
    present = per_class > 0
    share = np.array([1 - val_size - test_size, val_size, test_size])
    only_here = ((counts > 0) & ((counts > 0).sum(0) == 1)).any(1)  # the one group of a class has to train
    trials = int(np.clip(_PERMUTATION_WORK // counts.size, *_PERMUTATIONS))
    keys = np.random.default_rng(seed).random((trials, n_groups))
    keys[::2] += only_here  # every other order has them last
    order = keys.argsort(1)
    place = order.argsort(1)
    sizes = counts.sum(1)[order].cumsum(1)
    with_test = int(test_size > 0)
    n_val = _closest_prefix(sizes, np.full(trials, val_size * total), np.zeros(trials), n_groups - 1 - with_test)
    n_held_out = n_val
    if with_test:
        reached = np.take_along_axis(sizes, n_val[:, None] - 1, 1)[:, 0]
        n_held_out = _closest_prefix(sizes, reached + test_size * total, n_val, n_groups - 1)
    parts = np.where(place < n_val[:, None], VAL, np.where(place < n_held_out[:, None], TEST, TRAIN))
    found = np.stack([(parts == part) @ counts.astype(np.float64) for part in (TRAIN, VAL, TEST)], axis=1)
    absent = (found[:, :, present] == 0).sum(2)
    size_error = np.abs(found.sum(2) / total - share).sum(1)
    class_error = np.abs(found / np.maximum(per_class, 1) - share[:, None])[:, :, present].mean((1, 2))
    ranked = np.lexsort((np.round(size_error + class_error, 9), absent[:, 1:].sum(1), absent[:, 0]))
    kept: list[int] = []
    seen: set[bytes] = set()
    for trial in ranked:
        if len(kept) == n or (kept and absent[trial, 0]):
            break
        if (key := parts[trial].tobytes()) not in seen:
            seen.add(key)
            kept.append(int(trial))
    return [
        Assignment(parts[trial].astype(np.int8), np.flatnonzero(present & (found[trial, 0] == 0))) for trial in kept
    ]


def fold_groups(counts: np.ndarray, *, k: int, seed: int | Sequence[int], n: int = 1) -> list[np.ndarray]:
    """The ``n`` best different divisions of the groups into ``k`` folds, fewer if there are fewer: int ``[groups]``.

    In every seeded order each group goes to the fold with the fewest cells so far, in some orders to that with the
    fewest groups. Best is: two groups beside every fold, no class in one fold alone, then classes and cells spread most
    evenly.

    Parameters
    ----------
    counts
        Cells ``[groups, classes]``, with at least ``k`` groups.
    k
        Number of folds.
    seed
        Of the orders.
    n
        How many.
    """
    n_groups, per_class = len(counts), counts.sum(0)
    present = per_class > 0
    sizes = counts.sum(1)
    trials = int(np.clip(_PERMUTATION_WORK // (counts.size * k), *_PERMUTATIONS))
    order = np.random.default_rng(seed).random((trials, n_groups)).argsort(1)
    order[::2] = np.take_along_axis(order, np.argsort(-sizes[order], axis=1, kind="stable"), 1)[::2]  # large ones first
    folds = np.empty((trials, n_groups), dtype=np.int64)
    filled = np.zeros((trials, k), dtype=np.int64)
    every = np.arange(trials)
    for step in range(n_groups):
        groups = order[:, step]
        emptiest = filled.argmin(1)
        folds[every, groups] = emptiest
        filled[every, emptiest] += np.where(every % 4 == 3, 1, sizes[groups])
    members = np.stack([folds == fold for fold in range(k)], axis=1)
    lonely = (n_groups - members.sum(2) < 2).any(1)
    found = (members @ counts.astype(np.float64))[:, :, present]
    alone = ((found > 0).sum(1) == 1).sum(1)
    missing = (found == 0).sum((1, 2))
    uneven = np.abs(found.sum(2) / sizes.sum() - 1 / k).sum(1) + np.abs(found / per_class[present] - 1 / k).mean((1, 2))
    kept: list[np.ndarray] = []
    seen: set[bytes] = set()
    for trial in np.lexsort((np.round(uneven, 9), missing, alone, lonely)):
        if len(kept) == n:
            break
        named = np.unique(folds[trial], return_index=True)[1]  # the first group of each fold names it
        division = named.argsort().argsort()[folds[trial]]
        if (key := division.tobytes()) not in seen:
            seen.add(key)
            kept.append(division)
    return kept


def _closest_prefix(sizes: np.ndarray, wanted: np.ndarray, above: np.ndarray, most: int) -> np.ndarray:
    """How many of the first groups come closest to the wanted number of cells, ``above + 1`` to ``most``, by trial."""
    distance = np.abs(sizes[:, :most] - wanted[:, None])
    distance[np.arange(most) < above[:, None]] = np.inf
    return distance.argmin(1) + 1
