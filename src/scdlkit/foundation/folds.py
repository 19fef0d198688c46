"""Folds: every labelled cell tests once. Stratified by class, by whole groups on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ._group_splits import TEST, TRAIN, VAL, GroupTable, assign_groups, fold_groups, group_table
from ._split_checks import UNLABELLED, check_count, class_problems, group_problems, listing, trainable_classes
from .splits import Split, name_hashes, repeat_seed, round_to_total

_DIVISIONS = 20  # of groups into folds that are tried until one has every class in the training of every fold
_LARGEST_VAL = 0.5  # of the groups that are left, where a large one is tested


def make_folds(
    codes: np.ndarray,
    cell_names: np.ndarray,
    *,
    classes: Sequence[str] | np.ndarray,
    cv: int,
    groups: np.ndarray | None = None,
    val_size: float = 0.15,
    seed: int = 42,
    repeat: int = 0,
) -> list[Split]:
    """``cv`` splits in which every labelled cell is a test cell exactly once.

    Validation cells come out of the rest, training has what then remains. Without groups every class is spread over
    the folds, within one cell. With groups, whole groups go to one part, such that every class is in training in every
    fold.

    Parameters
    ----------
    codes, cell_names, classes, groups, seed
        As in :func:`make_split`.
    cv
        Number of folds.
    val_size
        Share of the labelled cells.
    repeat
        Which of several divisions into folds under one seed.

    Returns
    -------
    list of Split
        One a fold.

    Raises
    ------
    ValueError
        If :func:`fold_feasibility` finds a problem, or a number is out of range.

    Example
    -------
    >>> folds = make_folds(codes, adata.obs_names, classes=["B", "T"], cv=5)
    >>> np.sort(np.concatenate([split.test for split in folds]))
    """
    codes, cell_names = np.asarray(codes), np.asarray(cell_names)
    if len(codes) != len(cell_names):
        raise ValueError(f"codes has {len(codes)} cells, cell_names {len(cell_names)}.")
    if problems := fold_feasibility(codes, classes, groups, cv=cv, val_size=val_size, seed=seed):
        raise ValueError(" ".join(problems))
    labelled = np.flatnonzero(codes >= 0)
    if groups is None:
        parts = _stratified_folds(codes[labelled], cell_names[labelled], cv, val_size, seed, repeat)
    else:
        table = group_table(codes, np.asarray(groups), len(classes))
        found = _group_folds(table, cv, val_size, seed, n=repeat + 1)
        parts = found[repeat % len(found)].parts[:, table.group_of]
    splits = []
    for part in parts:
        assignment = np.full(len(codes), UNLABELLED, dtype=np.int8)
        assignment[labelled] = part
        splits.append(Split(assignment))
    return splits


def fold_feasibility(
    codes: np.ndarray,
    classes: Sequence[str] | np.ndarray,
    groups: np.ndarray | None = None,
    *,
    cv: int,
    val_size: float = 0.15,
    seed: int = 42,
) -> list[str]:
    """What stands in the way of ``cv`` folds, as sentences; empty if nothing does. Parameters as in :func:`make_folds`.

    Example
    -------
    >>> fold_feasibility(codes, ["B", "T"], donors, cv=10)
    ['10 folds by groups need at least 10 groups with labelled cells, found 3: d1, d2, d3. ...']
    """
    check_folds(cv, val_size)
    codes = np.asarray(codes)
    if problems := class_problems(codes, classes, smallest_class(cv)):
        return problems
    if groups is None:
        return []
    if problems := group_problems(codes, groups):
        return problems
    table = group_table(codes, np.asarray(groups), len(classes))
    if len(table.counts) < fewest_groups(cv):
        return [
            f"{cv} folds by groups need at least {fewest_groups(cv)} groups with labelled cells, found "
            f"{len(table.counts)}: {listing(table.names)}. Use fewer folds or a finer group_key."
        ]
    absent = _group_folds(table, cv, val_size, seed)[0].absent
    if not len(absent):
        return []
    where = [f"{classes[int(code)]} ({table.n_groups(code)})" for code in absent]
    return [
        f"No {cv} folds by whole groups have every class in training in every fold: left out would be {listing(where)} "
        f"(groups they occur in, of {len(table.counts)}). Use a finer group_key, merge or remove these classes, or "
        "drop them with small_classes='drop'."
    ]


def usable_in_folds(
    codes: np.ndarray,
    classes: Sequence[str] | np.ndarray,
    groups: np.ndarray | None = None,
    *,
    cv: int,
    val_size: float = 0.15,
    seed: int = 42,
) -> np.ndarray:
    """Classes that can be divided, bool ``[classes]``; as :func:`usable_classes` says it for a single split."""
    check_folds(cv, val_size)

    def left_out(table: GroupTable) -> np.ndarray:
        return _group_folds(table, cv, val_size, seed)[0].absent

    return trainable_classes(
        codes,
        len(classes),
        groups,
        smallest=smallest_class(cv),
        fewest_groups=fewest_groups(cv),
        left_out=left_out,
    )


def smallest_class(cv: int) -> int:
    """Fewest cells of a class such that beside the test cells of every fold one can train and one validate."""
    return 4 if cv == 2 else 3


def fewest_groups(cv: int) -> int:
    """Fewest groups such that beside every fold one can train and one validate."""
    return max(cv, 4 if cv == 2 else 3)


@dataclass(frozen=True)
class _GroupFolds:
    parts: np.ndarray  # int8 [folds, groups]
    absent: np.ndarray  # classes that some fold leaves out of training


def _stratified_folds(
    codes: np.ndarray, cell_names: np.ndarray, cv: int, val_size: float, seed: int, repeat: int
) -> np.ndarray:
    """Part of every cell in every fold, int8 ``[folds, n]``."""
    counts = np.bincount(codes)
    n_val = round_to_total(counts * val_size, np.zeros(len(counts)))
    fold_of = np.empty(len(codes), dtype=np.int64)
    # dealt out class by class, so that classes and folds are both even within one cell
    fold_of[np.lexsort((name_hashes(cell_names, repeat_seed(seed, repeat)), codes))] = np.arange(len(codes)) % cv
    parts = np.full((cv, len(codes)), TRAIN, dtype=np.int8)
    for fold in range(cv):
        parts[fold, fold_of == fold] = TEST
        order = np.argsort(name_hashes(cell_names, repeat_seed(seed, repeat, fold + 1)), kind="stable")
        order = order[fold_of[order] != fold]
        for code, wanted in enumerate(n_val):
            members = order[codes[order] == code]
            parts[fold, members[: min(wanted, len(members) - 1)]] = VAL
    return parts


def _group_folds(table: GroupTable, cv: int, val_size: float, seed: int, n: int = 1) -> list[_GroupFolds]:
    """The first ``n`` divisions with every class in training in every fold; the best one if there is none."""
    counts = table.counts
    present = counts.sum(0) > 0
    found: list[_GroupFolds] = []
    best: _GroupFolds | None = None
    for number, fold_of in enumerate(fold_groups(counts, k=cv, seed=[seed, 2], n=n + _DIVISIONS)):
        parts = np.full((cv, len(counts)), TEST, dtype=np.int8)
        absent = np.zeros(counts.shape[1], dtype=bool)
        for fold in range(cv):
            rest = np.flatnonzero(fold_of != fold)
            if len(rest) > 1:
                share = min(val_size * counts.sum() / counts[rest].sum(), _LARGEST_VAL)
                chosen = assign_groups(counts[rest], val_size=share, test_size=0, seed=[seed, 3, number, fold])
                parts[fold, rest] = chosen[0].parts
            absent |= present & (counts[parts[fold] == TRAIN].sum(0) == 0)
        division = _GroupFolds(parts, np.flatnonzero(absent))
        if best is None or len(division.absent) < len(best.absent):
            best = division
        if not absent.any():
            found.append(division)
        if len(found) == n:
            break
    if found:
        return found
    if best is None:
        raise ValueError(f"{len(counts)} groups cannot be divided into {cv} folds.")
    return [best]


def check_folds(cv: object, val_size: float) -> None:
    """Raise a ValueError unless there can be so many folds with so many validation cells."""
    check_count("cv", cv, 2)
    if not 0 < val_size < 1 - 1 / int(cv):  # type: ignore[call-overload]
        raise ValueError(f"val_size must be above 0 and below 1 - 1/cv to leave training cells, found {val_size}.")
