"""What a strategy may read of the cells."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from scdlkit.foundation.expression_rows import ExpressionRows
    from scdlkit.foundation.lower_states import StateRows
    from scdlkit.foundation.stored_tokens import AnyTokens

_PER_CELL = ("embedding", "expression", "tokens", "states", "codes")


@dataclass(frozen=True)
class CellData:
    """What a strategy may read of n cells; every part is optional.

    Parameters
    ----------
    embedding
        float32 ``[n, d]``, frozen ``<cls>`` embedding, not normalised.
    expression
        CSR ``[n, genes]``, every gene of the data set; or rows that are read when they are needed.
    gene_names
        str ``[genes]``, names of the columns of ``expression``.
    kind
        Values of ``expression``: ``"counts"``, ``"normalised"`` or ``"log1p"``.
    tokens
        Ragged tokens of the cells, in memory or in files.
    states
        What frozen lower blocks of the encoder make of the tokens, kept for training.
    codes
        int64 ``[n]``, label codes.

    Raises
    ------
    ValueError
        If the parts disagree in their number of cells or genes.
    """

    embedding: np.ndarray | None = None
    expression: sp.csr_matrix | ExpressionRows | None = None
    gene_names: np.ndarray | None = None
    kind: str = ""
    tokens: AnyTokens | None = None
    states: StateRows | None = None
    codes: np.ndarray | None = None

    def __post_init__(self) -> None:
        sizes = {name: _n_cells(getattr(self, name)) for name in _PER_CELL if getattr(self, name) is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The parts of CellData must have the same number of cells, found {sizes}.")
        if self.expression is not None:
            n_names = 0 if self.gene_names is None else len(self.gene_names)
            if n_names != self.expression.shape[1]:
                raise ValueError(f"gene_names has {n_names} names for {self.expression.shape[1]} genes of expression.")

    @property
    def n_cells(self) -> int:
        """Number of cells, 0 if there is no part."""
        return next((_n_cells(getattr(self, name)) for name in _PER_CELL if getattr(self, name) is not None), 0)

    def subset(self, index: np.ndarray) -> CellData:
        """The cells at ``index`` (integers), in that order."""
        parts = {name: getattr(self, name)[index] for name in _PER_CELL if getattr(self, name) is not None}
        return replace(self, **parts)

    def only(self, needs: Collection[str]) -> CellData:
        """The same cells with the parts named in ``needs``, and the codes; states are there wherever tokens are."""
        dropped: dict[str, Any] = {name: None for name in ("embedding", "expression", "tokens") if name not in needs}
        if "tokens" not in needs:
            dropped["states"] = None
        if "expression" not in needs:
            dropped |= {"gene_names": None, "kind": ""}
        return replace(self, **dropped)


def _n_cells(part: Any) -> int:
    return int(part.shape[0]) if hasattr(part, "shape") else int(part.n_cells)
