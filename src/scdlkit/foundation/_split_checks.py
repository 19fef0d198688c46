"""What stands in the way of a split, and what to know about one, as sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ._group_splits import TEST, VAL, GroupTable, group_table

UNLABELLED = -1


def check_sizes(val_size: float, test_size: float) -> None:
    """Raise a ValueError unless these shares leave cells to train on."""
    for name, size in (("val_size", val_size), ("test_size", test_size)):
        if not 0 < size < 1:
            raise ValueError(f"{name} must be above 0 and below 1, found {size}.")
    if val_size + test_size >= 1:
        raise ValueError(f"val_size + test_size must be below 1 to leave training cells, found {val_size + test_size}.")


def check_count(name: str, value: object, least: int) -> None:
    """Raise a ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}.")


def class_problems(codes: np.ndarray, classes: Sequence[str] | np.ndarray, smallest: int) -> list[str]:
    """Too few classes, or classes with too few cells, as sentences."""
    if len(codes) and (codes.min() < UNLABELLED or codes.max() >= len(classes)):
        raise ValueError(f"codes must be in [-1, {len(classes)}), found {codes.min()} to {codes.max()}.")
    if len(classes) < 2:
        return [f"At least two classes are needed to learn labels, found {len(classes)}."]
    counts = np.bincount(codes[codes >= 0], minlength=len(classes))
    small = [f"{classes[int(code)]} ({counts[code]})" for code in np.flatnonzero(counts < smallest)]
    if not small:
        return []
    return [
        f"Too few cells for train, validation and test: {listing(small)}; a class needs at least {smallest} labelled "
        "cells. Merge or remove these classes, or drop them with small_classes='drop'."
    ]


def group_problems(codes: np.ndarray, groups: np.ndarray) -> list[str]:
    """Labelled cells without a group, as a sentence."""
    if len(groups) != len(codes):
        raise ValueError(f"groups has {len(groups)} cells, codes {len(codes)}.")
    without = int((pd.isna(np.asarray(groups)) & (codes >= 0)).sum())
    return [f"{without} labelled cells have no group; give them one or leave out group_key."] if without else []


def name_warnings(cell_names: np.ndarray) -> list[str]:
    """Cells that names cannot tell apart, as a sentence."""
    n_repeated = len(cell_names) - len(np.unique(cell_names.astype(str)))
    if not n_repeated:
        return []
    return [f"{n_repeated} cell names are not unique; the split of these cells depends on their order."]


def absence_warnings(
    codes: np.ndarray, assignments: Sequence[np.ndarray], classes: Sequence[str] | np.ndarray, *, by_group: bool
) -> list[str]:
    """Classes without validation or test cells in some splits, as sentences."""
    texts = []
    for part, word in ((VAL, "validation"), (TEST, "test")):
        found = [np.bincount(codes[parts == part], minlength=len(classes)) == 0 for parts in assignments]
        times = np.sum(found, axis=0)
        names = [
            f"{classes[int(code)]}" + (f" ({times[code]} of {len(assignments)} fits)" if len(assignments) > 1 else "")
            for code in np.flatnonzero(times)
        ]
        if names:
            why = "occur in too few groups" if by_group else "have too few cells"
            texts.append(f"No {word} cells of {listing(names)}: these classes {why}.")
    return texts


def trainable_classes(
    codes: np.ndarray,
    n_classes: int,
    groups: np.ndarray | None,
    *,
    smallest: int,
    fewest_groups: int,
    left_out: Callable[[GroupTable], np.ndarray],
) -> np.ndarray:
    """Classes with at least ``smallest`` cells that whole groups do not keep out of training, bool ``[classes]``."""
    codes = np.asarray(codes)
    usable = np.bincount(codes[codes >= 0], minlength=n_classes) >= smallest
    if groups is None:
        return usable
    groups = np.asarray(groups)
    kept = np.where((codes >= 0) & usable[codes] & ~pd.isna(groups), codes, UNLABELLED)
    usable &= np.bincount(kept[kept >= 0], minlength=n_classes) >= smallest
    # Dropping classes changes what the best assignment is, so drop until nothing is left out.
    while usable.any():
        kept = np.where((kept >= 0) & usable[kept], kept, UNLABELLED)
        table = group_table(kept, groups, n_classes)
        if len(table.counts) < fewest_groups:
            break
        absent = [code for code in left_out(table) if usable[code]]
        if not absent:
            break
        usable[absent] = False
    return usable


def listing(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
