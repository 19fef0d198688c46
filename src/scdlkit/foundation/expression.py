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

Of a matrix in memory all values are looked at first. Of one on disk or in dask, a sample of its cells decides on matrix and
kind, and every value is checked when it is read: what cannot be an expression value ends the reading with an error, and
values of another kind than the sample's are warned about.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from scdlkit._settings import logger
from scdlkit.foundation import matrices
from scdlkit.foundation._candidates import Candidate, has_x, of_layer, of_raw, of_x
from scdlkit.foundation.matrices import Scan
from scdlkit.foundation.vocabulary import GeneMatch, Vocabulary, check_overlap, minimum_overlap

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import Index

__all__ = ["CHUNK_CELLS", "Expression", "check_overlap", "choose_expression", "minimum_overlap"]

CHUNK_CELLS = 4096
_FINGERPRINT_CELLS = 256


@dataclass(frozen=True, eq=False)
class Expression:
    """The values a model reads, row by row, and the tokens of their genes.

    Attributes
    ----------
    matrix
        The AnnData's own matrix, not copied and never changed (of a view: an object that reads rows of it; of a CSC matrix,
        which has no cheap rows: a CSR copy). Read it through :meth:`chunks`, :meth:`rows` or :meth:`pieces`.
    genes
        The token of each of its genes.
    source
        ``"X"``, ``"raw.X"`` or ``"layers['…']"``.
    kind
        ``"counts"``, ``"normalised"`` (linear scale) or ``"log1p"``.
    names
        ``obs_names``.
    warnings
        What was warned about when it was chosen.
    largest
        The largest value of the cells that were looked at.
    check
        Looks at values as they are read, where a sample decided.
    """

    matrix: Any = field(repr=False)
    genes: GeneMatch = field(repr=False)
    source: str
    kind: str
    names: Index = field(repr=False)
    warnings: tuple[str, ...] = ()
    largest: float = 0.0
    check: ValueCheck | None = field(default=None, repr=False)

    @property
    def n_cells(self) -> int:
        """Rows."""
        return int(self.matrix.shape[0])

    @property
    def n_genes(self) -> int:
        """Columns, known to the checkpoint or not."""
        return int(self.matrix.shape[1])

    @cached_property
    def cell_names(self) -> np.ndarray:
        """``obs_names`` as strings."""
        return np.asarray(self.names).astype(str).astype(object)

    @property
    def log_values(self) -> bool:
        """Whether values are on a log1p scale, which matters where duplicate genes are added up."""
        return self.kind == "log1p"

    def chunks(
        self, size: int = CHUNK_CELLS, *, skip: Container[int] = frozenset()
    ) -> Iterator[tuple[slice, sp.csr_matrix]]:
        """Read all cells in order.

        Parameters
        ----------
        size
            Most cells per chunk.
        skip
            First cells of chunks to leave out; where chunks begin depends on the matrix and ``size`` alone.

        Yields
        ------
        The cells' slice, and their rows: canonical float32 CSR over all genes, a copy that may be changed freely. Memory
        stays at one chunk (for dask: one dask chunk, or the small ones that make up a chunk).

        Raises
        ------
        ValueError
            If a value is negative, NaN or infinite, where only a sample was looked at before.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, found {size}.")
        for cells, rows in matrices.iterate_rows(self.matrix, size, skip=skip):
            if self.check is not None:
                self.check.judge(np.arange(cells.start, cells.stop), matrices.scan(rows))
            yield cells, rows

    def pieces(
        self, size: int = CHUNK_CELLS, *, skip: Container[int] = frozenset()
    ) -> Iterator[tuple[slice, Expression]]:
        """The same as :meth:`chunks`, each chunk as an expression of its own, in memory and checked."""
        for cells, rows in self.chunks(size, skip=skip):
            yield cells, replace(self, matrix=rows, names=self.names[cells], check=None)

    def fingerprint(self, size: int = CHUNK_CELLS) -> str:
        """Hex digest of genes, numbers, some of the rows, and where :meth:`chunks` begin: the same data, the same digest."""
        digest = hashlib.blake2b(digest_size=16)
        some = matrices.read_spread(self.matrix, _FINGERPRINT_CELLS)
        ends = np.array([block.stop for block in matrices.row_blocks(self.matrix, size)], dtype=np.int64)
        for array in (np.array(self.matrix.shape), self.genes.token_ids, some.indptr, some.indices, some.data, ends):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(f"{self.source} {self.kind} {size}".encode())
        return digest.hexdigest()

    def rows(self, index: Sequence[int] | np.ndarray) -> sp.csr_matrix:
        """Rows of the selected cells (positions in any order, or a boolean mask), as :meth:`chunks` gives them."""
        chosen = np.arange(self.n_cells)[np.asarray(index, dtype=None if len(index) else np.intp)]
        rows = matrices.read_index(self.matrix, chosen)
        if self.check is not None:
            self.check.judge(chosen, matrices.scan(rows))
        return rows


def choose_expression(
    adata: AnnData, vocabulary: Vocabulary, *, layer: str | None = None, use_raw: bool | None = None
) -> Expression:
    """Choose the matrix to read, check its values, and find its genes in the vocabulary.

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
        chosen = of_layer(adata, vocabulary, layer)
    elif use_raw:
        chosen = of_raw(adata, vocabulary)
    elif use_raw is False:
        chosen = of_x(adata, vocabulary)
    else:
        chosen = _by_default(adata, vocabulary, notes)
    if not chosen.scan.usable:
        raise ValueError(_complaint(adata, chosen, chosen.scan))
    kind, odd = matrices.classify(chosen.rows, chosen.scan, logged="log1p" in adata.uns)
    notes += [f"{chosen.source}: {note}." for note in odd]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    logger.debug("%s holds %s of %d genes", chosen.source, kind, chosen.genes.n_genes)
    check = None
    if not matrices.in_memory(chosen.rows):
        check = ValueCheck(adata, chosen, kind)
        if chosen.scan.n_rows < adata.n_obs:
            logger.info(
                "%s holds %s, judged by %d of %d cells; the values of all others are checked when they are read.",
                chosen.source, kind, chosen.scan.n_rows, adata.n_obs,
            )  # fmt: skip
    return Expression(
        chosen.rows, chosen.genes, chosen.source, kind, _cell_index(adata), tuple(notes), chosen.scan.largest, check
    )


def _by_default(adata: AnnData, vocabulary: Vocabulary, notes: list[str]) -> Candidate:
    x = of_x(adata, vocabulary) if has_x(adata) else None
    if x is not None and x.scan.usable:
        if adata.raw is None:
            return x
        raw = of_raw(adata, vocabulary)
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
        raw = of_raw(adata, vocabulary)
        if raw.scan.usable:
            notes.append(f".raw.X is used, since {reason}; use_raw=True says so without this warning.")
            return raw
    if "counts" in adata.layers:
        counts = of_layer(adata, vocabulary, "counts")
        if counts.scan.usable:
            notes.append(f"layers['counts'] is used, since {reason}; layer='counts' says so without this warning.")
            return counts
    return of_x(adata, vocabulary) if x is None else x


def _cell_index(adata: AnnData) -> Index:
    """``obs_names``, also where they were not loaded with the rest."""
    return getattr(adata.obs, "true_index", adata.obs_names)


class ValueCheck:
    """Judges values that the sample did not show, as they are read."""

    def __init__(self, adata: AnnData, chosen: Candidate, kind: str) -> None:
        self._adata, self._chosen, self._kind = adata, chosen, kind
        self._limit = matrices.largest_logarithm("log1p" in adata.uns) if kind == "log1p" else np.inf

    def judge(self, positions: Sequence[int] | np.ndarray, found: Scan) -> None:
        """Raise a ValueError for values that are no expression; warn, once, where they are of another kind.

        Parameters
        ----------
        positions
            Of the cells.
        found
            What their values are like.
        """
        if found.first_bad is not None:
            row, column, value = found.first_bad
            raise ValueError(
                _complaint(self._adata, self._chosen, replace(found, first_bad=(int(positions[row]), column, value)))
            )
        surprise = ""
        if self._kind == "counts" and not found.integers:
            surprise = "fractions"
        elif found.largest > self._limit:
            surprise = f"values over {self._limit:g}"
        if surprise:
            logger.warning(
                "%s holds %s, judged by %d of its cells, but from cell %r on there are %s: are values of two kinds mixed? "
                "They are all read as %s.",
                self._chosen.source, self._kind, self._chosen.scan.n_rows,
                str(self._adata.obs_names[int(positions[0])]), surprise, self._kind,
            )  # fmt: skip
            self._kind, self._limit = "", np.inf


def _complaint(adata: AnnData, chosen: Candidate, scanned: Scan) -> str:
    if scanned.first_bad is None:
        raise RuntimeError("no bad value was found")
    row, column, value = scanned.first_bad
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
