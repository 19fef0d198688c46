"""Several fits on the same cells: repeated splits, folds, or repeated folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ._split_checks import UNLABELLED, absence_warnings, check_count, check_sizes, name_warnings
from .folds import check_folds, fold_feasibility, make_folds, usable_in_folds
from .splits import Split, make_split, repeat_seed, split_feasibility, usable_classes


@dataclass(frozen=True)
class Fit:
    """One split, on which every strategy is trained once.

    Parameters
    ----------
    repeat, fold
        Which it is, from 0.
    split_by
        ``"cell"``, or ``"group"`` where whole groups stay together.
    split
        Part of every cell.
    seed
        Of the training.
    """

    repeat: int
    fold: int
    split_by: Literal["cell", "group"]
    split: Split
    seed: int


@dataclass(frozen=True)
class SplitPlan:
    """How cells are split, and how often.

    Parameters
    ----------
    val_size, test_size
        Shares of the labelled cells; with ``cv`` a fold is the test.
    n_repeats
        Repeats of the split, or of the folds.
    cv
        Number of folds; None for a single split in each repeat.
    seed
        Of all splits.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    val_size: float = 0.15
    test_size: float = 0.15
    n_repeats: int = 1
    cv: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        check_count("n_repeats", self.n_repeats, 1)
        if self.cv is None:
            check_sizes(self.val_size, self.test_size)
        else:
            check_folds(self.cv, self.val_size)

    @property
    def n_fits(self) -> int:
        """Number of fits of every strategy."""
        return self.n_repeats * (self.cv or 1)

    def problems(
        self, codes: np.ndarray, classes: Sequence[str] | np.ndarray, groups: np.ndarray | None = None
    ) -> list[str]:
        """What stands in the way, as sentences; empty if nothing does. Parameters as in :func:`make_split`."""
        if self.cv is None:
            return split_feasibility(codes, classes, groups, test_size=self.test_size, **self._common)
        return fold_feasibility(codes, classes, groups, cv=self.cv, **self._common)

    def usable(
        self, codes: np.ndarray, classes: Sequence[str] | np.ndarray, groups: np.ndarray | None = None
    ) -> np.ndarray:
        """Classes that can be split, bool ``[classes]``; the others have to be dropped or merged."""
        if self.cv is None:
            return usable_classes(codes, classes, groups, test_size=self.test_size, **self._common)
        return usable_in_folds(codes, classes, groups, cv=self.cv, **self._common)

    def fits(
        self,
        codes: np.ndarray,
        cell_names: np.ndarray,
        *,
        classes: Sequence[str] | np.ndarray,
        groups: np.ndarray | None = None,
    ) -> list[Fit]:
        """Every fit, repeat by repeat; parameters and errors as in :func:`make_split` and :func:`make_folds`."""
        by: Literal["cell", "group"] = "cell" if groups is None else "group"
        fits = []
        for repeat in range(self.n_repeats):
            common = {"classes": classes, "groups": groups, "repeat": repeat, **self._common}
            if self.cv is None:
                splits = [make_split(codes, cell_names, test_size=self.test_size, **common)]
            else:
                splits = make_folds(codes, cell_names, cv=self.cv, **common)
            fits += [
                Fit(repeat, fold, by, split, repeat_seed(self.seed, repeat, fold)) for fold, split in enumerate(splits)
            ]
        return fits

    def fits_by_cell(
        self, fits: Sequence[Fit], codes: np.ndarray, cell_names: np.ndarray, *, classes: Sequence[str] | np.ndarray
    ) -> list[Fit]:
        """For every fit by groups one by cell, whose validation and test are as large, unless ``cv`` fixes the folds."""
        if self.cv is not None:
            return self.fits(codes, cell_names, classes=classes)
        found = []
        for fit in fits:
            n = (fit.split.assignment != UNLABELLED).sum()
            sizes = {"val_size": len(fit.split.val) / n, "test_size": len(fit.split.test) / n}
            split = make_split(codes, cell_names, classes=classes, seed=self.seed, repeat=fit.repeat, **sizes)
            found.append(Fit(fit.repeat, fit.fold, "cell", split, fit.seed))
        return found

    def warnings(
        self, fits: Sequence[Fit], codes: np.ndarray, cell_names: np.ndarray, classes: Sequence[str] | np.ndarray
    ) -> list[str]:
        """What to know about the splits, as sentences."""
        by_group = fits[0].split_by == "group"
        texts = [] if by_group else name_warnings(np.asarray(cell_names))
        texts += absence_warnings(codes, [fit.split.assignment for fit in fits], classes, by_group=by_group)
        repeats: dict[int, set[bytes]] = {}
        for fit in fits:
            repeats.setdefault(fit.repeat, set()).add(fit.split.assignment.tobytes())
        different = len(set(map(frozenset, repeats.values())))
        if by_group and different < len(repeats):
            texts.append(
                f"{len(repeats)} repeats share {different} different splits by whole groups, as no more were found with "
                "every class in training; repeats on the same split differ in the seed of the training alone."
            )
        return texts

    @property
    def _common(self) -> dict[str, Any]:
        return {"val_size": self.val_size, "seed": self.seed}
