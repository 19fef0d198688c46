"""How good is a strategy with few labels? The same fits with ever more of the training and validation labels hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from .plan import Fit
from .repeated import compare
from .splits import TRAIN, UNLABELLED, VAL, Split, name_hashes
from .strategies import CellData, Strategy

_DROPPED = (
    "rank",
    "auroc_note",
    "peak_memory_mb",
)  # of the comparison: they say nothing beyond it, or cost a word each


def label_efficiency(
    strategies: Sequence[Strategy],
    cells: CellData,
    fits: Sequence[Fit],
    classes: Sequence[str] | np.ndarray,
    cell_names: np.ndarray,
    *,
    fractions: Sequence[float],
    seed: int,
    device: str = "cpu",
    progress: bool | None = None,
) -> pd.DataFrame:
    """Compare strategies with several shares of the labels, on the same test cells.

    Parameters
    ----------
    strategies, cells, fits, classes, device, progress
        As in :func:`scdlkit.foundation.repeated.compare`.
    cell_names
        str ``[n]``, names of ``cells``.
    fractions
        Shares of the labels of training and validation cells, see :func:`hide_labels`.
    seed
        Of the choice which labels stay.

    Returns
    -------
    DataFrame
        One row a share and strategy, see :func:`scdlkit.tl.label_efficiency`.

    Raises
    ------
    ValueError
        If ``fractions`` is empty, has a value twice, or one that is not above 0 and at most 1.
    """
    check_fractions(fractions)
    tables = []
    for fraction in sorted(fractions):
        reduced = [
            replace(fit, split=hide_labels(fit.split, np.asarray(cells.codes), cell_names, fraction, seed=seed))
            for fit in fits
        ]
        fresh = [strategy.unfitted() for strategy in strategies]
        try:
            table = compare(fresh, cells, reduced, classes, device=device, progress=progress).table
        except RuntimeError as error:  # all of them failed, with this share
            table = pd.DataFrame(
                {
                    "strategy": [strategy.name for strategy in fresh],
                    "role": [strategy.role for strategy in fresh],
                    "uses_encoder": [strategy.uses_encoder for strategy in fresh],
                    "n_fits": 0,
                    "error": str(error),
                }
            )
        n_train, n_val = (
            float(np.mean([len(getattr(fit.split, part)) for fit in reduced])) for part in ("train", "val")
        )
        table = table.drop(columns=[name for name in _DROPPED if name in table])
        for name, value in (("n_val", n_val), ("n_train", n_train), ("n_labelled", n_train + n_val)):
            table.insert(3, name, value)
        table.insert(3, "fraction", float(fraction))
        tables.append(table)
    whole = pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True)
    columns = [name for name in max(tables, key=lambda table: table.shape[1]) if name in whole]
    return whole[columns]


def hide_labels(split: Split, codes: np.ndarray, cell_names: np.ndarray, fraction: float, *, seed: int) -> Split:
    """A split that keeps a share of its training and validation cells; the others count as unlabelled.

    The share is taken of each class in either part, rounded, at least one cell. Whoever has few labels has few to
    choose by, so validation shrinks as training does. Smaller shares are contained in larger ones, and a cell stays or
    goes by a hash of its name, wherever in the data it stands.

    Parameters
    ----------
    split
        All labels.
    codes, cell_names
        ``[n]``, label code and name of every cell.
    fraction
        Share that stays, above 0 and at most 1.
    seed
        Another seed, other cells.

    Example
    -------
    >>> hide_labels(split, codes, names, 0.1, seed=0).train
    """
    assignment = split.assignment.copy()
    order = np.lexsort((np.asarray(cell_names).astype(str), name_hashes(cell_names, seed)))
    for part in (TRAIN, VAL):
        for code in np.unique(codes[split.assignment == part]):
            members = order[(split.assignment[order] == part) & (codes[order] == code)]
            assignment[members[max(1, round(fraction * len(members))) :]] = UNLABELLED
    return Split(assignment, split.warnings)


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise a ValueError unless these are different shares above 0 and at most 1."""
    if not len(fractions):
        raise ValueError("fractions is empty; give at least one share of the labels, such as (0.1, 1.0).")
    if wrong := [value for value in fractions if not 0 < value <= 1]:
        raise ValueError(f"fractions must be above 0 and at most 1, found {', '.join(map(str, wrong))}.")
    if len(set(fractions)) < len(fractions):
        raise ValueError(f"fractions must be different, found {', '.join(map(str, fractions))}.")
