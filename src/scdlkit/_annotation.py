"""Write an annotation into an AnnData: everything is computed before, so an error leaves the AnnData as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._keys import SPLITS, UNASSIGNED, ResultKeys
from ._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData


def write_annotation(
    adata: AnnData,
    prediction: Mapping[str, np.ndarray],
    splits: np.ndarray,
    *,
    keys: ResultKeys,
    classes: np.ndarray,
    params: Mapping[str, Any],
    strategies: pd.DataFrame,
    history: pd.DataFrame,
    per_class: pd.DataFrame,
) -> None:
    """Write labels, confidences, splits, embedding, probabilities and the comparison under ``keys``.

    Parameters
    ----------
    adata
        Written to; a view becomes an actual AnnData.
    prediction
        What ``AnnotationRunner.predict`` returns.
    splits
        int8 ``[cells]``: 0 train, 1 val, 2 test, -1 neither.
    keys, classes, params, strategies, history, per_class
        See :meth:`scdlkit.AnnotationRunner.annotate_adata`.
    """
    codes, probabilities = prediction["label_codes"], prediction["probabilities"]
    names = [str(name) for name in classes]
    unassigned = codes < 0
    if unassigned.any() and UNASSIGNED not in names:
        names.append(UNASSIGNED)
    shown = np.where(unassigned, names.index(UNASSIGNED) if UNASSIGNED in names else -1, codes)
    confidence = np.full(len(codes), np.nan, dtype=np.float32)
    confidence[~unassigned] = probabilities[~unassigned, codes[~unassigned]]
    columns = {
        keys.label: pd.Categorical.from_codes(shown.astype(np.int64), categories=pd.Index(names, dtype=object)),
        keys.label_code: codes,
        keys.confidence: confidence,
        keys.split: pd.Categorical.from_codes(
            np.where(splits < 0, SPLITS.index("unlabelled"), splits).astype(np.int64), categories=pd.Index(SPLITS)
        ),
    }
    result = {
        "params": {**params, "obs_key": keys.label, "embedding_key": keys.embedding},
        "classes": np.array(names[: len(classes)], dtype=str),
        "strategies": _storable(strategies),
        "history": _storable(history),
        "per_class": _storable(per_class),
    }
    to_actual(adata)
    for name, column in columns.items():
        adata.obs[name] = column
    adata.obsm[keys.embedding] = prediction["latent"]
    adata.obsm[keys.probabilities] = probabilities
    adata.uns[keys.uns] = result
    # colours of an earlier result would be matched to other categories
    adata.uns.pop(f"{keys.label}_colors", None)


def to_actual(adata: AnnData) -> None:
    """Turn a view into an AnnData of its own, as scanpy does before it writes."""
    if adata.is_view:
        logger.info("Received a view of an AnnData; it becomes an actual AnnData to be written to.")
        adata._init_as_actual(adata.copy())


def _storable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a text index and no missing text, as h5ad and zarr need it."""
    table = table.copy()
    table.index = table.index.astype(str)
    for name in table.columns:
        if table[name].dtype == object:
            table[name] = table[name].fillna("").astype(str)
    return table
