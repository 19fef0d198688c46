"""Write an annotation into an AnnData: everything is computed before, so an error leaves the AnnData as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._keys import SPLITS, UNASSIGNED, ResultKeys
from ._settings import logger

if TYPE_CHECKING:
    from anndata import AnnData


def write_annotation(
    adata: AnnData, result: Mapping[str, np.ndarray], *, keys: ResultKeys, classes: np.ndarray, uns: Mapping[str, Any]
) -> None:
    """Write labels, confidences, splits, embedding, probabilities and the comparison under ``keys``.

    Parameters
    ----------
    adata
        Written to; a view becomes an actual AnnData.
    result
        What :class:`scdlkit._prediction.Predictor` gives, of all cells.
    keys, classes
        See :meth:`scdlkit.AnnotationRunner.annotate_adata`.
    uns
        From :func:`describe_result`.
    """
    columns = result_columns(result, keys=keys, classes=classes)
    to_actual(adata)
    for name, column in columns.items():
        adata.obs[name] = column
    adata.obsm[keys.embedding] = result["latent"]
    adata.obsm[keys.probabilities] = result["probabilities"]
    adata.uns[keys.uns] = dict(uns)
    # colours of an earlier result would be matched to other categories
    adata.uns.pop(keys.colors, None)


def result_columns(result: Mapping[str, np.ndarray], *, keys: ResultKeys, classes: np.ndarray) -> dict[str, Any]:
    """The columns of ``.obs``: label, code, confidence and split."""
    codes, splits = result["label_codes"], result["split"]
    names = [str(name) for name in classes]
    unassigned = codes < 0
    if unassigned.any() and UNASSIGNED not in names:
        names.append(UNASSIGNED)
    # small numbers: there may be millions of cells
    shown = codes.astype(np.int32)
    shown[unassigned] = names.index(UNASSIGNED) if UNASSIGNED in names else -1
    parts = splits.astype(np.int8)
    parts[splits < 0] = SPLITS.index("unlabelled")
    return {
        keys.label: pd.Categorical.from_codes(shown, categories=pd.Index(names, dtype=object)),
        keys.label_code: codes,
        keys.confidence: result["confidence"],
        keys.split: pd.Categorical.from_codes(parts, categories=pd.Index(SPLITS)),
    }


def describe_result(
    keys: ResultKeys,
    *,
    classes: np.ndarray,
    params: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, Any]:
    """What is kept under ``.uns[key_added]``, in a form that h5ad and zarr can hold."""
    return {
        "params": {**params, "obs_key": keys.label, "embedding_key": keys.embedding},
        "classes": np.array([str(name) for name in classes], dtype=str),
        **{name: storable(table) for name, table in tables.items()},
    }


def check_target(
    adata: AnnData, keys: ResultKeys | None = None, *, inputs: Iterable[str | None] = (), copy: bool = False
) -> None:
    """Find out whether results can be written before anything is computed.

    Parameters
    ----------
    adata
        To be written to.
    keys
        Where the results go.
    inputs
        Columns of ``.obs`` the results are learnt from, which must stay.
    copy
        Whether a copy is to be written to.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData.
    ValueError
        If a column of ``inputs`` would be overwritten, or a copy or view of a backed AnnData would be needed.
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, found {type(adata).__name__}.")
    for name in inputs:
        if keys is not None and name in keys.columns and name in adata.obs:
            raise ValueError(
                f"The result would overwrite adata.obs[{name!r}], which holds the labels or groups it is learnt from; "
                "choose another key_added."
            )
    if adata.isbacked and (copy or adata.is_view):
        what = "copy=True makes a copy" if copy else "this is a view, which has to be copied to be written to,"
        raise ValueError(f"{what} of an AnnData that is backed by a file: call adata.to_memory() first.")


def to_actual(adata: AnnData) -> None:
    """Turn a view into an AnnData of its own, as scanpy does before it writes."""
    if adata.is_view:
        logger.info("Received a view of an AnnData; it becomes an actual AnnData to be written to.")
        adata._init_as_actual(adata.copy())


def storable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a text index and no missing text, as h5ad and zarr need it."""
    table = table.copy()
    table.index = table.index.astype(str)
    for name in table.columns:
        if table[name].dtype == object:
            table[name] = table[name].fillna("").astype(str)
    return table
