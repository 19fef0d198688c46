"""True and predicted labels of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_KEY, SPLITS, UNASSIGNED, ResultKeys

from ._result import RUN_FIRST, find_classes, find_keys, find_obs, find_param

if TYPE_CHECKING:
    from anndata import AnnData


def predictions(
    adata: AnnData,
    *,
    split: str | Sequence[str] | None = "test",
    label_key: str | None = None,
    key: str = DEFAULT_KEY,
) -> pd.DataFrame:
    """True and predicted label of each labelled cell.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation` or :func:`scdlkit.tl.predict`.
    split
        Which cells: ``"test"`` (never seen in training nor in choosing the strategy), ``"val"``, ``"train"``,
        ``"unlabelled"``, several of them, or None for every labelled cell.
    label_key
        Column of ``.obs`` with the true labels; the one the model was trained on by default.
    key
        The result (``key_added``).

    Returns
    -------
    DataFrame
        One row a cell with a true label, in the order of ``adata.obs_names``: ``true`` and ``predicted`` (str),
        ``confidence`` (probability of the predicted label; NaN for cells that could not be assigned, whose
        ``predicted`` is ``"unassigned"``), ``split`` (str, ``""`` where none was recorded).

    Raises
    ------
    KeyError
        If predictions, splits or true labels are missing; says what to run.
    ValueError
        If ``split`` is unknown or no labelled cell is in it.

    Example
    -------
    >>> cells = sk.get.predictions(adata)
    >>> (cells["true"] == cells["predicted"]).mean()
    """
    keys = find_keys(adata, key)
    hint = f"Run {RUN_FIRST} or sk.tl.predict(adata, runner) first, or pass the key= they were given as key_added."
    predicted = find_obs(adata, keys.label, hint)
    confidence = find_obs(adata, keys.confidence, hint)
    splits = _splits(adata, keys, needed=split is not None)
    true = _true_labels(adata, label_key, key)

    chosen = true.notna().to_numpy()
    if split is not None:
        wanted = [split] if isinstance(split, str) else list(split)
        unknown = [name for name in wanted if name not in SPLITS]
        if unknown or not wanted:
            raise ValueError(f"split must be None or of {', '.join(map(repr, SPLITS))}, found {split!r}.")
        chosen &= np.isin(splits, wanted)
    if not chosen.any():
        counts = ", ".join(f"{name or 'no split'} {count}" for name, count in pd.Series(splits).value_counts().items())
        raise ValueError(f"no labelled cell with split={split!r} (cells of all splits: {counts}).")
    frame = pd.DataFrame(
        {
            "true": true.to_numpy(),
            "predicted": predicted.astype(object).map(str, na_action="ignore").fillna(UNASSIGNED).to_numpy(),
            "confidence": confidence.to_numpy(dtype=float),
            "split": splits,
        },
        index=adata.obs_names,
    )
    return frame[chosen]


def prediction_classes(adata: AnnData, *, key: str = DEFAULT_KEY) -> list[str]:
    """Classes the model can predict; from the predicted column where the AnnData keeps no record of the fit."""
    if isinstance(adata.uns.get(key), Mapping) and "classes" in adata.uns[key]:
        return list(find_classes(adata, key))
    labels = adata.obs[find_keys(adata, key).label].astype("category")
    return [str(name) for name in labels.cat.categories if str(name) != UNASSIGNED]


def _splits(adata: AnnData, keys: ResultKeys, *, needed: bool) -> np.ndarray:
    if keys.split not in adata.obs and not needed:
        return np.full(adata.n_obs, "", dtype=object)
    column = find_obs(adata, keys.split, "If none of these cells was used to fit the model, pass split=None.")
    return column.astype(object).map(str, na_action="ignore").fillna("").to_numpy(dtype=object)


def _true_labels(adata: AnnData, label_key: str | None, key: str) -> pd.Series:
    if label_key is None:
        label_key = find_param(adata, "label_key", key)
        if not label_key:
            raise KeyError(f"adata.uns[{key!r}]['params'] does not say which column was learned; pass label_key=.")
    column = find_obs(adata, label_key, "Pass label_key= with the column of true labels.")
    return column.astype(object).map(str, na_action="ignore")
