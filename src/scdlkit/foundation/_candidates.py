"""The matrices of an AnnData that may be read: ``.X``, ``.raw.X`` and layers, whole or of a view, with their genes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from . import matrices
from .gene_names import gene_columns
from .matrices import Scan
from .vocabulary import GeneMatch, Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData


class _ViewRows:
    """Rows of a view of an AnnData; reading ``.X`` of the whole view would copy all of it."""

    def __init__(self, view: AnnData, get: Callable[[AnnData], Any]) -> None:
        # anndata has no public way to these, and cannot index a view of a backed file once more.
        self._parent, columns = view._adata_ref, view._vidx
        # anndata misreads positions of rows together with every second column, or columns in reverse.
        stepped = isinstance(columns, slice) and columns.step not in (None, 1)
        self._columns = np.arange(self._parent.n_vars)[columns] if stepped else columns
        self._positions = np.arange(self._parent.n_obs)[view._oidx]
        self._get = get
        self.in_memory = not view.isbacked and matrices.in_memory(get(self._parent))
        probe = self[:1]
        self.dtype, self.shape = probe.dtype, (view.n_obs, probe.shape[1])
        self.format = getattr(probe, "format", None)

    def __getitem__(self, rows: Any) -> Any:
        wanted, back = np.unique(self._positions[rows], return_inverse=True)  # HDF5 reads increasing positions only
        return self._get(self._parent[wanted, self._columns])[back]

    def to_memory(self) -> Any:
        return self[:]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A matrix that may be read."""

    source: str
    matrix: Any
    genes: GeneMatch
    gene_names: np.ndarray
    n_useful: int

    @cached_property
    def rows(self) -> Any:
        """The matrix in a form with cheap rows."""
        return matrices.with_rows(self.matrix)

    @cached_property
    def scan(self) -> Scan:
        """What its values are like."""
        return matrices.scan(self.rows)


def _frame(var: Any) -> Any:
    """A data frame, which a lazily read one has to be turned into."""
    return var.to_memory() if hasattr(var, "to_memory") else var


def has_x(adata: AnnData) -> bool:
    """Whether there is an ``.X``."""
    return (adata._adata_ref if adata.is_view else adata).X is not None  # .X of a view is a copy of all of it


def of_x(adata: AnnData, vocabulary: Vocabulary) -> Candidate:
    """``.X``, or a ValueError where there is none."""
    if not has_x(adata):
        raise ValueError(f"adata.X is None; name a layer ({list(adata.layers)}) or use_raw=True.")
    # CELLxGENE files keep genes that were filtered before normalisation as empty columns of .X.
    filtered = np.asarray(adata.var["feature_is_filtered"]) if "feature_is_filtered" in adata.var else None
    filtered = filtered if filtered is not None and filtered.dtype == bool else None
    return _candidate(adata, vocabulary, "X", lambda some: some.X, filtered=filtered)


def of_layer(adata: AnnData, vocabulary: Vocabulary, layer: str) -> Candidate:
    """A layer that is there."""
    return _candidate(adata, vocabulary, f"layers[{layer!r}]", lambda some: some.layers[layer])


def of_raw(adata: AnnData, vocabulary: Vocabulary) -> Candidate:
    """``.raw.X`` of an AnnData that has it."""
    return _candidate(adata, vocabulary, "raw.X", lambda some: some.raw.X, raw=True)


def _candidate(
    adata: AnnData,
    vocabulary: Vocabulary,
    source: str,
    get: Callable[[AnnData], Any],
    *,
    raw: bool = False,
    filtered: np.ndarray | None = None,
) -> Candidate:
    var = _frame(adata.var)
    columns = gene_columns(_frame(adata.raw.var), var) if raw else gene_columns(var)
    if not len(columns["var_names"]):
        raise ValueError(f"{source} has no genes (adata has shape {adata.n_obs} × {adata.n_vars}).")
    # Of a view, .raw in memory is a matrix of its own already, and a dask array is lazy anyway.
    whole = not adata.is_view or (raw and not adata.isbacked) or matrices.is_dask(get(adata._adata_ref))
    matrix = get(adata) if whole else _ViewRows(adata, get)
    matrices.check_supported(matrix, f"adata.{source}")
    genes = vocabulary.match(columns)
    useful = genes.token_ids >= 0
    if filtered is not None:
        useful &= ~filtered
    return Candidate(source, matrix, genes, columns["var_names"], len(np.unique(genes.token_ids[useful])))
