"""Strategy tables, training history and per-class scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scdlkit._keys import DEFAULT_KEY

from ._result import find_table

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
        best, by validation scores), ``val_*`` and ``test_*`` metrics, ``n_trainable`` parameters, ``fit_seconds``,
        ``embed_seconds`` (one pass, shared by the strategies on the frozen embedding), ``peak_memory_mb`` (MiB),
        ``error`` (empty, or why the strategy failed; such rows come last).

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
        ``value`` (float; NaN where the metric is undefined or the strategy failed), by rank.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.

    Example
    -------
    >>> metrics = sk.get.strategy_metrics(adata)
    >>> metrics.query("split == 'test' and metric == 'macro_f1'")
    """
    table = strategy_table(adata, key=key)
    pieces = []
    for split in _SCORED_SPLITS:
        for column in [name for name in table.columns if name.startswith(f"{split}_")]:
            piece = table[["strategy", "role"]].copy()
            piece["split"] = split
            piece["metric"] = column.removeprefix(f"{split}_")
            piece["value"] = table[column].astype(float)
            piece["_row"] = piece.index
            pieces.append(piece)
    if not pieces:
        return pd.DataFrame(columns=["strategy", "role", "split", "metric", "value"])
    tidy = pd.concat(pieces).sort_values("_row", kind="stable", ignore_index=True)
    return tidy.drop(columns="_row")


def history(adata: AnnData, *, strategy: str | None = None, key: str = DEFAULT_KEY) -> pd.DataFrame:
    """Training history, one row an epoch of a strategy.

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
        ``strategy``, ``epoch``, ``train_loss``, ``val_loss``, ``val_macro_f1``. Fits without epochs (such as
        ``frozen_probe``) have at most one row, of epoch 0.

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
        ``strategy``, ``split``, ``class``, ``precision``, ``recall``, ``f1``, ``support`` (cells of the class).

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
    if split is not None and split not in _SCORED_SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, _SCORED_SPLITS))} or None, found {split!r}.")
    table = _of_strategy(adata, find_table(adata, "per_class", key), strategy, key)
    if split is not None:
        table = table[table["split"] == split].reset_index(drop=True)
    return table


def _of_strategy(adata: AnnData, table: pd.DataFrame, strategy: str | None, key: str) -> pd.DataFrame:
    if strategy is None:
        return table
    compared = list(strategy_table(adata, key=key)["strategy"])
    if strategy not in compared:
        raise ValueError(f"strategy {strategy!r} was not compared here; compared: {', '.join(compared)}.")
    return table[table["strategy"] == strategy].reset_index(drop=True)
