"""Do the groups tell the labels? Then a split by groups asks for something else than a split by cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._group_splits import GroupTable, group_table
from ._split_checks import listing

STRONG = 0.5  # by Cohen's convention an effect of 0.5 is large


def cramers_v(counts: np.ndarray) -> float:
    """Association of two groupings of cells: 0 if one says nothing about the other, 1 if it tells it.

    Cramér's V with the correction for bias of Bergsma (2013), https://doi.org/10.1016/j.jkss.2012.10.002, without which
    many small groups look associated with anything.

    Parameters
    ----------
    counts
        Cells ``[groups, classes]``.

    Returns
    -------
    float
        NaN with fewer than two groups or classes.

    Example
    -------
    >>> cramers_v(np.array([[10, 0], [0, 10]]))
    1.0
    """
    counts = np.asarray(counts, dtype=np.float64)
    counts = counts[counts.sum(1) > 0][:, counts.sum(0) > 0]
    rows, columns = counts.shape
    n = counts.sum()
    if min(rows, columns) < 2:
        return float("nan")
    expected = counts.sum(1)[:, None] * counts.sum(0) / n
    phi2 = ((counts - expected) ** 2 / expected).sum() / n
    phi2 = max(0.0, phi2 - (rows - 1) * (columns - 1) / (n - 1))
    smaller = min(size - (size - 1) ** 2 / (n - 1) for size in (rows, columns))
    return float(min(1.0, np.sqrt(phi2 / (smaller - 1)))) if smaller > 1 else float("nan")


def confounding_warnings(
    codes: np.ndarray, groups: np.ndarray, *, classes: Sequence[str] | np.ndarray, group_key: str
) -> list[str]:
    """What to know about labels that depend on the groups, as sentences; empty if nothing.

    Parameters
    ----------
    codes
        int ``[n]``, positions in ``classes``, -1 for unlabelled cells.
    groups
        ``[n]``.
    classes
        Names of the classes.
    group_key
        What the groups are called.

    Example
    -------
    >>> confounding_warnings(codes, donors, classes=["B", "T"], group_key="donor")
    """
    table = group_table(np.asarray(codes), np.asarray(groups), len(classes))
    texts = []
    if (association := cramers_v(table.counts)) >= STRONG:
        texts.append(
            f"Labels and {group_key!r} are confounded (Cramér's V {association:.2f}; 0: independent, 1: one tells the "
            "other): what is learnt of a class may be the mark of its group, and scores on whole groups suffer from "
            "classes that are rare in the groups that train."
        )
    if alone := _alone(table, classes):
        texts.append(
            f"{len(alone)} of {int((table.counts.sum(0) > 0).sum())} classes occur in one value of {group_key!r} alone: "
            f"{listing(alone)}. Whether such a class is recognised in another one cannot be measured here."
        )
    return texts


def _alone(table: GroupTable, classes: Sequence[str] | np.ndarray) -> list[str]:
    """Classes of a single group, with it and their cells."""
    found = []
    for code in np.flatnonzero((table.counts > 0).sum(0) == 1):
        group = int(table.counts[:, code].argmax())
        found.append(f"{classes[int(code)]} ({table.names[group]}, {table.counts[group, code]:,} cells)")
    return found
