"""The table of a label efficiency run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from scdlkit._keys import DEFAULT_EFFICIENCY_KEY

from ._result import find_table

if TYPE_CHECKING:
    from anndata import AnnData


def label_efficiency(adata: AnnData, *, strategy: str | None = None, key: str = DEFAULT_EFFICIENCY_KEY) -> pd.DataFrame:
    """Scores of every strategy with every share of the labels.

    Parameters
    ----------
    adata
        AnnData with a result of :func:`scdlkit.tl.label_efficiency`.
    strategy
        One strategy or baseline; all by default.
    key
        Where the result is in ``.uns`` (``key_added`` of that call).

    Returns
    -------
    DataFrame
        A copy of ``adata.uns[key]["efficiency"]``, see :func:`scdlkit.tl.label_efficiency` for the columns.

    Raises
    ------
    KeyError
        If the AnnData holds no such result.
    ValueError
        If ``strategy`` is not among those compared.

    Example
    -------
    >>> sk.get.label_efficiency(adata).pivot(index="strategy", columns="fraction", values="test_macro_f1")
    """
    table = find_table(adata, "efficiency", key, holds="efficiency", run="sk.tl.label_efficiency(adata, label_key=...)")
    if strategy is None:
        return table
    if strategy not in set(table["strategy"]):
        compared = ", ".join(dict.fromkeys(table["strategy"]))
        raise ValueError(f"strategy {strategy!r} was not compared here; compared: {compared}.")
    return table[table["strategy"] == strategy].reset_index(drop=True)
