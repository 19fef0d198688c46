"""Which matrix of an AnnData is used, what its values are, and its rows.

Choices
-------
Without ``layer`` or ``use_raw``:

1. ``.X``, whenever its values are finite and not negative, unless
2. ``.raw`` is usable and knows over a tenth more genes of the checkpoint than ``.X`` (``.X`` holds only highly variable
   genes, say): then ``.raw.X``, with a warning.
3. Where ``.X`` is absent or has negative values (scaled): ``.raw.X``, else ``layers["counts"]``, with a warning.

NaN or infinite values in ``.X`` are never worked around. Since binning goes by rank within a cell, counts, normalised and
log1p values of the same genes give the same tokens; ``kind`` says which they are for those who need to know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdlkit._settings import logger
from scdlkit.foundation import matrices
from scdlkit.foundation.gene_names import gene_columns
from scdlkit.foundation.matrices import Scan
from scdlkit.foundation.vocabulary import GeneMatch, Vocabulary, check_overlap, minimum_overlap

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Expression", "check_overlap", "choose_expression", "minimum_overlap"]


@dataclass(frozen=True, eq=False)
class Expression:
    """The values a model reads, row by row, and the tokens of their genes.

    Attributes
    ----------
    matrix
        The AnnData's own matrix, not copied and never changed (of a view: an object that reads rows of it; of a CSC matrix,
        which has no cheap rows: a CSR copy). Read it through :meth:`chunks` and :meth:`rows`.
    genes
        The token of each of its genes.
    source
        ``"X"``, ``"raw.X"`` or ``"layers['…']"``.
    kind
        ``"counts"``, ``"normalised"`` (linear scale) or ``"log1p"``.
    cell_names
        ``obs_names`` as strings.
    warnings
        What was warned about when it was chosen.
    largest
        The largest value.
    """

    matrix: Any = field(repr=False)
    genes: GeneMatch = field(repr=False)
    source: str
    kind: str
    cell_names: np.ndarray = field(repr=False)
    warnings: tuple[str, ...]
    largest: float

    @property
    def n_cells(self) -> int:
        """Rows."""
        return int(self.matrix.shape[0])

    @property
    def n_genes(self) -> int:
        """Columns, known to the checkpoint or not."""
        return int(self.matrix.shape[1])

    @property
    def log_values(self) -> bool:
        """Whether values are on a log1p scale, which matters where duplicate genes are added up."""
        return self.kind == "log1p"

    def chunks(self, size: int = 4096) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """Read all cells in order.

        Parameters
        ----------
        size
            Most cells per chunk.

        Yields
        ------
        The cells' slice, and their rows: canonical float32 CSR over all genes, a copy that may be changed freely. Memory
        stays at one chunk (for dask: one dask chunk).
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, found {size}.")
        yield from matrices.iterate_rows(self.matrix, size)

    def rows(self, index: Sequence[int] | np.ndarray) -> sp.csr_matrix:
        """Rows of the selected cells (positions in any order, or a boolean mask), as :meth:`chunks` gives them."""
        chosen = np.asarray(index, dtype=None if len(index) else np.intp)
        return matrices.read_index(self.matrix, np.arange(self.n_cells)[chosen])


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
        probe = self[:1]
        self.dtype, self.shape = probe.dtype, (view.n_obs, probe.shape[1])
        self.format = getattr(probe, "format", None)

    def __getitem__(self, rows: Any) -> Any:
        wanted, back = np.unique(self._positions[rows], return_inverse=True)  # HDF5 reads increasing positions only
        return self._get(self._parent[wanted, self._columns])[back]

    def to_memory(self) -> Any:
        return self[:]


@dataclass(frozen=True, eq=False)
class _Candidate:
    source: str
    matrix: Any
    genes: GeneMatch
    gene_names: np.ndarray
    n_useful: int

    @cached_property
    def rows(self) -> Any:
        return matrices.with_rows(self.matrix)

    @cached_property
    def scan(self) -> Scan:
        return matrices.scan(self.rows)


def choose_expression(
    adata: AnnData, vocabulary: Vocabulary, *, layer: str | None = None, use_raw: bool | None = None
) -> Expression:
    """Choose the matrix to read, check all its values, and find its genes in the vocabulary.

    Parameters
    ----------
    adata
        Cells by genes. It is not changed.
    vocabulary
        The checkpoint's genes.
    layer
        Name of the layer to use.
    use_raw
        ``True``: ``.raw.X``. ``False``: ``.X`` and nothing else. ``None``: chosen, see the head of this module.

    Returns
    -------
    The expression. Too few known genes are not an error here: see
    :func:`~scdlkit.foundation.vocabulary.check_overlap`.

    Raises
    ------
    TypeError
        If ``adata`` is not an AnnData, or the matrix does not hold real numbers.
    ValueError
        If there are no cells or no genes; if ``layer`` or ``.raw`` is missing, or both are asked for; if values are
        negative, NaN or infinite (with the first cell and gene).

    Warns
    -----
    UserWarning
        If something else than ``.X`` was chosen, or the values are odd.

    Example
    -------
    >>> expression = choose_expression(adata, vocabulary, layer="counts")  # doctest: +SKIP
    >>> expression.source, expression.kind  # doctest: +SKIP
    ("layers['counts']", 'counts')
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, found {type(adata).__name__}.")
    if layer is not None and use_raw:
        raise ValueError(f"layer={layer!r} and use_raw=True exclude each other; give one of them.")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"layer {layer!r} is not in adata.layers; available: {list(adata.layers)}.")
    if use_raw and adata.raw is None:
        raise ValueError("use_raw=True, but adata.raw is None; leave use_raw out, or name a layer.")
    if adata.n_obs == 0:
        raise ValueError(f"adata has no cells (shape {adata.n_obs} × {adata.n_vars}).")

    notes: list[str] = []
    if layer is not None:
        chosen = _layer(adata, vocabulary, layer)
    elif use_raw:
        chosen = _raw(adata, vocabulary)
    elif use_raw is False:
        chosen = _x(adata, vocabulary)
    else:
        chosen = _by_default(adata, vocabulary, notes)
    if not chosen.scan.usable:
        raise ValueError(_complaint(adata, chosen))
    kind, odd = matrices.classify(chosen.rows, chosen.scan, logged="log1p" in adata.uns)
    notes += [f"{chosen.source}: {note}." for note in odd]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    logger.debug("%s holds %s of %d genes", chosen.source, kind, chosen.genes.n_genes)
    cell_names = np.asarray(adata.obs_names).astype(str).astype(object)
    return Expression(chosen.rows, chosen.genes, chosen.source, kind, cell_names, tuple(notes), chosen.scan.largest)


def _by_default(adata: AnnData, vocabulary: Vocabulary, notes: list[str]) -> _Candidate:
    x = _x(adata, vocabulary) if _has_x(adata) else None
    if x is not None and x.scan.usable:
        if adata.raw is None:
            return x
        raw = _raw(adata, vocabulary)
        if raw.n_useful > 1.1 * x.n_useful and raw.scan.usable:
            notes.append(
                f".raw.X is used, not .X: the checkpoint knows {raw.n_useful:,} of its genes, and {x.n_useful:,} of those "
                f"in .X. use_raw=True says so without this warning, use_raw=False takes .X."
            )
            return raw
        return x
    if x is not None and x.scan.missing + x.scan.infinite:
        return x
    reason = "there is no .X" if x is None else ".X has negative values (scaled?)"
    if adata.raw is not None:
        raw = _raw(adata, vocabulary)
        if raw.scan.usable:
            notes.append(f".raw.X is used, since {reason}; use_raw=True says so without this warning.")
            return raw
    if "counts" in adata.layers:
        counts = _layer(adata, vocabulary, "counts")
        if counts.scan.usable:
            notes.append(f"layers['counts'] is used, since {reason}; layer='counts' says so without this warning.")
            return counts
    return _x(adata, vocabulary) if x is None else x


def _has_x(adata: AnnData) -> bool:
    return (adata._adata_ref if adata.is_view else adata).X is not None  # .X of a view is a copy of all of it


def _x(adata: AnnData, vocabulary: Vocabulary) -> _Candidate:
    if not _has_x(adata):
        raise ValueError(f"adata.X is None; name a layer ({list(adata.layers)}) or use_raw=True.")
    # CELLxGENE files keep genes that were filtered before normalisation as empty columns of .X.
    filtered = np.asarray(adata.var["feature_is_filtered"]) if "feature_is_filtered" in adata.var else None
    filtered = filtered if filtered is not None and filtered.dtype == bool else None
    return _candidate(adata, vocabulary, "X", lambda some: some.X, filtered=filtered)


def _layer(adata: AnnData, vocabulary: Vocabulary, layer: str) -> _Candidate:
    return _candidate(adata, vocabulary, f"layers[{layer!r}]", lambda some: some.layers[layer])


def _raw(adata: AnnData, vocabulary: Vocabulary) -> _Candidate:
    return _candidate(adata, vocabulary, "raw.X", lambda some: some.raw.X, raw=True)


def _candidate(
    adata: AnnData,
    vocabulary: Vocabulary,
    source: str,
    get: Callable[[AnnData], Any],
    *,
    raw: bool = False,
    filtered: np.ndarray | None = None,
) -> _Candidate:
    columns = gene_columns(adata.raw.var, adata.var) if raw else gene_columns(adata.var)
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
    return _Candidate(source, matrix, genes, columns["var_names"], len(np.unique(genes.token_ids[useful])))


def _complaint(adata: AnnData, chosen: _Candidate) -> str:
    scanned, bad = chosen.scan, chosen.scan.first_bad
    if bad is None:
        raise RuntimeError("no bad value was found")
    row, column, value = bad
    counts = {"negative": scanned.negative, "NaN": scanned.missing, "infinite": scanned.infinite}
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    advice = "Remove or repair these cells or genes."
    if scanned.negative:
        layers = [f"layer={name!r}" for name in adata.layers if chosen.source != f"layers[{name!r}]"]
        others = layers + ["use_raw=True"] * (adata.raw is not None and chosen.source != "raw.X")
        advice = "Scaled, regressed or batch-corrected values do not work: give counts, normalised or log1p values" + (
            f", perhaps {' or '.join(others)}." if others else "."
        )
    return (
        f"adata.{chosen.source} has values that are no expression ({found}), the first {value:g} in cell "
        f"{str(adata.obs_names[row])!r}, gene {str(chosen.gene_names[column])!r}. {advice}"
    )
