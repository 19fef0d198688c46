"""Labels and groups of cells, read from ``.obs``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .foundation.plan import SplitPlan

if TYPE_CHECKING:
    from anndata import AnnData

DEFAULT_LABEL_KEY = "cell_type"
_GROUP_WORDS = ("donor", "batch", "patient", "subject", "individual", "sample", "library", "study", "dataset", "assay")


@dataclass(frozen=True)
class Labels:
    """Labels of cells as codes.

    Parameters
    ----------
    codes
        int64 ``[cells]``, position in ``classes``, -1 where a cell has no label.
    classes
        str ``[classes]``, names as the user wrote them: in category order, else sorted.
    """

    codes: np.ndarray
    classes: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each class."""
        found = np.bincount(self.codes[self.codes >= 0], minlength=len(self.classes))
        return dict(zip(self.classes.tolist(), found.tolist(), strict=True))


def find_label_key(adata: AnnData, label_key: str | None) -> str:
    """The label column, or a ValueError that lists the candidates."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, found {type(adata).__name__}.")
    if adata.n_obs == 0:
        raise ValueError(f"adata has no cells (shape {adata.n_obs} × {adata.n_vars}).")
    key = DEFAULT_LABEL_KEY if label_key is None else label_key
    if key in adata.obs:
        return key
    candidates = [
        name
        for name, column in _columns(adata)
        if not pd.api.types.is_float_dtype(column) and 2 <= column.nunique() <= max(2, adata.n_obs // 2)
    ]
    named = ", ".join(repr(name) for name in candidates) or "none"
    asked = f"label_key={label_key!r}" if label_key is not None else f"No label_key given and {key!r}"
    raise ValueError(f"{asked} is not a column of adata.obs. Columns that could hold labels: {named}.")


def read_labels(adata: AnnData, label_key: str) -> Labels:
    """Labels of a column of ``.obs``; missing ones get the code -1, unused categories are left out.

    Raises
    ------
    ValueError
        If fewer than two labels are found.
    """
    column = column_of(adata, label_key)
    if not isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype("category")
    column = column.cat.remove_unused_categories()
    classes = np.array([str(name) for name in column.cat.categories], dtype=object)
    if len(np.unique(classes)) < len(classes):
        raise ValueError(f"label_key={label_key!r} has different values with the same text; make them distinct.")
    codes = column.cat.codes.to_numpy().astype(np.int64)
    if len(classes) < 2:
        found = f"one ({classes[0]!r})" if len(classes) else "none: all values are missing"
        raise ValueError(f"label_key={label_key!r} must hold at least 2 different labels, found {found}.")
    return Labels(codes, classes)


def read_groups(adata: AnnData, group_key: str | None) -> np.ndarray | None:
    """Group of each cell as text, or None without a ``group_key``.

    Raises
    ------
    ValueError
        If the column is missing, or some cells have no group.
    """
    if not group_key:
        return None
    if group_key not in adata.obs:
        candidates = ", ".join(repr(name) for name in group_candidates(adata)) or "none"
        raise ValueError(
            f"group_key={group_key!r} is not a column of adata.obs. Columns that look like groups: {candidates}."
        )
    column = column_of(adata, group_key)
    if missing := int(column.isna().sum()):
        raise ValueError(f"group_key={group_key!r} is missing for {missing:,} cells; every cell needs a group.")
    return column.astype(str).to_numpy()


def group_candidates(adata: AnnData, exclude: tuple[str, ...] = ()) -> dict[str, int]:
    """Columns whose name speaks of donors or batches, with their number of values."""
    return {
        str(name): int(column.nunique())
        for name, column in _columns(adata, lambda name: any(word in name.lower() for word in _GROUP_WORDS))
        if name not in exclude and not pd.api.types.is_float_dtype(column) and 2 <= column.nunique() < adata.n_obs
    }


def column_of(adata: AnnData, name: str) -> pd.Series:
    """A column of ``.obs``, in memory also where ``adata`` was read lazily."""
    column = adata.obs[name]
    return column if isinstance(column, pd.Series) else column.to_series()


def _columns(adata: AnnData, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, pd.Series]]:
    """Columns of ``.obs`` whose name is wanted, one after another."""
    return ((name, column_of(adata, name)) for name in adata.obs.keys() if wanted(str(name)))


def drop_small_classes(labels: Labels, groups: np.ndarray | None, plan: SplitPlan) -> tuple[Labels, list[str]]:
    """Labels without the classes that are too small to be split, and these with their numbers of cells as text."""
    keep = plan.usable(labels.codes, labels.classes, groups)
    dropped = [f"{name} ({labels.counts[name]})" for name in labels.classes[~keep]]
    new_codes = np.append(np.where(keep, np.cumsum(keep) - 1, -1), -1)  # the last entry maps -1 to -1
    return Labels(new_codes[labels.codes], labels.classes[keep]), dropped
