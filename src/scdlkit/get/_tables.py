"""Strategy tables, training history and per-class scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scdlkit._keys import DEFAULT_KEY

from ._result import find_result, find_table

if TYPE_CHECKING:
    from anndata import AnnData

_SCORED_SPLITS = ("val", "test")


def strategy_table(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """The comparison of strategies, best rank first.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    key
        Where the result is in ``.uns`` (``key_added`` of that call).

    Returns
    -------
    DataFrame
        A copy of ``adata.uns[key]["strategies"]``, one row a strategy or baseline: ``strategy``, ``role``
        (``"strategy"`` or ``"baseline"``), ``uses_encoder`` (False where no foundation model is in it), ``rank`` (1 is
        best, by validation scores), ``val_*`` and ``test_*`` metrics (means over the fits), ``*_macro_f1_sd`` (standard
        deviation over the fits; NaN for one), ``*_macro_f1_low`` and ``*_macro_f1_high`` (95 % bootstrap interval over
        fits and cells), ``n_trainable`` parameters, ``fit_seconds`` (mean), ``embed_seconds`` (one pass, shared by the
        strategies on the frozen embedding), ``peak_memory_mb`` (MiB, maximum), ``n_fits`` that finished, ``error``
        (empty, or why the strategy failed, if in one fit alone; such rows come last).

    Raises
    ------
    KeyError
        If the AnnData holds no such result.

    Example
    -------
    >>> sk.get.strategy_table(adata)[["strategy", "val_macro_f1", "test_macro_f1"]]
    """
    table = find_table(adata, "strategies", key)
    if "rank" in table:
        table = table.sort_values("rank", kind="stable", na_position="last", ignore_index=True)
    return table


def strategy_metrics(adata: AnnData, *, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Every metric of every strategy, one value a row.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        ``strategy``, ``role``, ``split`` (``"val"`` or ``"test"``), ``metric`` (``"macro_f1"``, ``"accuracy"``, ...),
        ``value`` (mean over the fits; NaN where the metric is undefined or the strategy failed), ``sd`` over the fits
        (NaN for one fit), ``low`` and ``high`` (95 % interval; of the macro-F1 alone, else NaN), by rank.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.

    Example
    -------
    >>> metrics = sk.get.strategy_metrics(adata)
    >>> metrics.query("split == 'test' and metric == 'macro_f1'")
    """
    table, folds = strategy_table(adata, key=key), fold_metrics(adata, key=key)
    if len(folds):
        folds = folds[folds["split_by"] == folds["split_by"].iloc[0]]
    spread = folds.groupby("strategy").std(numeric_only=True).reindex(table["strategy"])
    pieces = []
    for split in _SCORED_SPLITS:
        for column in [name for name in table.columns if name.startswith(f"{split}_") and name in folds]:
            piece = table[["strategy", "role"]].copy()
            piece["split"] = split
            piece["metric"] = column.removeprefix(f"{split}_")
            piece["value"] = table[column].astype(float)
            piece["sd"] = spread[column].where(piece["value"].notna().to_numpy()).to_numpy(dtype=float)
            for bound in ("low", "high"):
                piece[bound] = table[f"{column}_{bound}"] if f"{column}_{bound}" in table else np.nan
            piece["_row"] = piece.index
            pieces.append(piece)
    if not pieces:
        return pd.DataFrame(columns=["strategy", "role", "split", "metric", "value", "sd", "low", "high"])
    tidy = pd.concat(pieces).sort_values("_row", kind="stable", ignore_index=True)
    return tidy.drop(columns="_row")


def fold_metrics(adata: AnnData, *, strategy: str | None = None, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Scores of every strategy on every fit.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    strategy
        One strategy; all by default.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        One row a strategy and fit: ``strategy``, ``role``, ``split_by`` (``"cell"`` or ``"group"``; with a
        ``group_key`` there are rows of both), ``repeat``, ``fold``, ``val_*`` and ``test_*`` metrics (NaN where
        undefined or failed), ``n_trainable``, ``fit_seconds``, ``peak_memory_mb``, ``error``.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``strategy`` is not among those compared.

    Example
    -------
    >>> sk.get.fold_metrics(adata).pivot_table("test_macro_f1", ["repeat", "fold"], "strategy")
    """
    return _of_strategy(adata, find_table(adata, "folds", key), strategy, key)


def differences(adata: AnnData, *, split: str | None = None, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Macro-F1 of every strategy minus that of the best baseline, and of the best strategy.

    Both are scored on the same cells of the same fits, and resampled together.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    split
        ``"val"`` or ``"test"``; both by default.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        ``strategy``, ``reference``, ``reference_role`` (``"baseline"``: best-ranked baseline without the foundation
        model, if there is one; ``"best"``: best-ranked strategy), ``split``, ``difference``, ``low`` and ``high`` (95 %
        interval), ``excludes_zero``. Strategies that failed have no rows.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``split`` is unknown.

    Example
    -------
    >>> sk.get.differences(adata, split="test").query("reference_role == 'baseline'")
    """
    return _of_split(find_table(adata, "differences", key), split)


def leakage_gap(adata: AnnData, *, split: str | None = None, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Macro-F1 on splits by cell and by whole groups side by side.

    The gap is what a strategy seems to gain where cells of one donor are both learnt from and scored.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation` with a ``group_key``.
    split
        ``"val"`` or ``"test"``; both by default.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        ``strategy``, ``role``, ``split``, ``by_cell``, ``by_group``, ``gap`` (``by_cell - by_group``), ``low`` and
        ``high`` (95 % interval of the gap), by rank. NaN where a strategy failed.

    Raises
    ------
    KeyError
        If the AnnData holds no such result, or was adapted without a ``group_key`` or with ``leakage_gap=False``.
    ValueError
        If ``split`` is unknown.

    Example
    -------
    >>> sk.get.leakage_gap(adata, split="test")[["strategy", "by_cell", "by_group", "gap"]]
    """
    if "leakage" not in find_result(adata, key):
        raise KeyError(
            f"adata.uns[{key!r}] has no 'leakage': it is measured with a group_key= and without leakage_gap=False."
        )
    return _of_split(find_table(adata, "leakage", key), split)


def history(adata: AnnData, *, strategy: str | None = None, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Training history, one row an epoch of a fit of a strategy.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    strategy
        One strategy; all by default.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        ``strategy``, ``repeat``, ``fold``, ``epoch``, ``train_loss``, ``val_loss``, ``val_macro_f1``. Fits without
        epochs (such as ``frozen_probe``) have at most one row, of epoch 0.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``strategy`` is not among those compared.

    Example
    -------
    >>> sk.get.history(adata, strategy="head").plot(x="epoch", y="val_macro_f1")
    """
    return _of_strategy(adata, find_table(adata, "history", key), strategy, key)


def per_class_metrics(
    adata: AnnData, *, strategy: str | None = None, split: str | None = None, key: str = DEFAULT_KEY
) -> pd.DataFrame:
    """Precision, recall and F1 of every class.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.adapt_annotation`.
    strategy
        One strategy; all by default.
    split
        ``"val"`` or ``"test"``; both by default.
    key
        Where the result is in ``.uns``.

    Returns
    -------
    DataFrame
        ``strategy``, ``split``, ``class``, ``precision``, ``recall``, ``f1`` (means over the fits in which they are
        defined), ``f1_sd`` over these fits (NaN for one), ``support`` (mean number of cells of the class in a fit).

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``strategy`` or ``split`` is unknown.

    Example
    -------
    >>> sk.get.per_class_metrics(adata, strategy="head", split="test").sort_values("f1").head()
    """
    _check_split(split)
    return _of_split(_of_strategy(adata, find_table(adata, "per_class", key), strategy, key), split)


def _check_split(split: str | None) -> None:
    if split is not None and split not in _SCORED_SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, _SCORED_SPLITS))} or None, found {split!r}.")


def _of_split(table: pd.DataFrame, split: str | None) -> pd.DataFrame:
    _check_split(split)
    return table if split is None else table[table["split"] == split].reset_index(drop=True)


def _of_strategy(adata: AnnData, table: pd.DataFrame, strategy: str | None, key: str) -> pd.DataFrame:
    if strategy is None:
        return table
    compared = list(strategy_table(adata, key=key)["strategy"])
    if strategy not in compared:
        raise ValueError(f"strategy {strategy!r} was not compared here; compared: {', '.join(compared)}.")
    return table[table["strategy"] == strategy].reset_index(drop=True)
