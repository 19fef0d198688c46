"""Find what an annotation wrote in an AnnData, or say what is missing and what to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_EFFICIENCY_KEY, DEFAULT_KEY, ResultKeys
from scdlkit._labels import column_of

if TYPE_CHECKING:
    from anndata import AnnData

RUN_FIRST = "sk.tl.adapt_annotation(adata, label_key=...)"


def check_adata(adata: Any) -> None:
    """Raise TypeError unless ``adata`` is an AnnData."""
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, found {type(adata).__name__}.")


def find_result(
    adata: AnnData, key: str = DEFAULT_KEY, *, holds: str = "strategies", run: str = RUN_FIRST
) -> Mapping[str, Any]:
    """``adata.uns[key]`` as an annotation wrote it.

    Parameters
    ----------
    adata, key
        Where to look.
    holds
        What every such result has, to name those under other keys.
    run
        What writes such a result.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData.
    KeyError
        If there is no such result; names the results that are there and what to run.
    """
    check_adata(adata)
    found = adata.uns.get(key)
    if not isinstance(found, Mapping):
        others = [name for name, value in adata.uns.items() if isinstance(value, Mapping) and holds in value]
        known = f" Results are stored under: {', '.join(map(repr, others))}; choose one with key=." if others else ""
        if key not in (DEFAULT_KEY, DEFAULT_EFFICIENCY_KEY):
            run = run.replace("=...", f"=..., key_added={key!r}")
        what = "annotation result" if holds == "strategies" else "such result"
        raise KeyError(f"adata.uns[{key!r}] holds no {what}.{known} Run {run} first.")
    return found


def find_table(
    adata: AnnData, name: str, key: str = DEFAULT_KEY, *, holds: str = "strategies", run: str = RUN_FIRST
) -> pd.DataFrame:
    """A copy of the DataFrame ``adata.uns[key][name]`` with plain text columns, whatever file it came from."""
    result = find_result(adata, key, holds=holds, run=run)
    if not isinstance(result.get(name), pd.DataFrame):
        raise KeyError(
            f"adata.uns[{key!r}] has no table {name!r} (found: {', '.join(map(str, result)) or 'nothing'}). "
            f"Run {run} again."
        )
    table = result[name].reset_index(drop=True)
    # h5ad and zarr give text back as object, string or categorical columns, by version.
    for column in table.columns:
        if not pd.api.types.is_numeric_dtype(table[column].dtype) and not pd.api.types.is_bool_dtype(table[column]):
            values = table[column].astype(object)
            table[column] = values.where(values.notna(), "").map(str).astype(object)
    return table


def find_classes(adata: AnnData, key: str = DEFAULT_KEY) -> np.ndarray:
    """Class names in code order, an object array of str."""
    result = find_result(adata, key)
    if "classes" not in result:
        raise KeyError(f"adata.uns[{key!r}] has no 'classes'. Run {RUN_FIRST} again.")
    return np.array([str(name) for name in np.asarray(result["classes"]).ravel()], dtype=object)


def find_param(adata: AnnData, name: str, key: str = DEFAULT_KEY) -> str:
    """A text parameter of the run, ``""`` where it was not stored."""
    params = find_result(adata, key).get("params", {})
    return str(np.asarray(params.get(name, "")).item())


def find_keys(adata: AnnData, key: str = DEFAULT_KEY) -> ResultKeys:
    """Where the result stands in ``.obs`` and ``.obsm``, with the names that the run was given for them."""
    check_adata(adata)
    if not isinstance(adata.uns.get(key), Mapping):
        return ResultKeys(key)
    return ResultKeys(key, label=find_param(adata, "obs_key", key), embedding=find_param(adata, "embedding_key", key))


def find_obs(adata: AnnData, column: str, hint: str) -> pd.Series:
    """A column of ``.obs``, or a KeyError that ends with ``hint``."""
    if column not in adata.obs:
        raise KeyError(f"adata.obs[{column!r}] not found. {hint}")
    return column_of(adata, column)
