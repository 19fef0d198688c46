"""Turn rows of an expression matrix into scGPT tokens: genes and value bins, ragged, the same for a cell wherever it is.

A cell becomes its expressed genes that the vocabulary knows, each with the bin of its value: the edges are the
cell's own quantiles, so only the order of the values matters and counts, normalised counts and log1p give the same
tokens (Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0). Two choices are random in scGPT, which bin a
value gets that several edges tie on and which genes stay when there are more than fit. Here both are hashes of
(seed, the cell's genes and the order of their values): cell order, batch and process change nothing.

How a row is binned in linear time: scatter into a scratch row ordered by token id (this merges duplicate genes and
sorts by id), radix-sort the values' float32 bits, walk values and edges together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numba
import numpy as np
import scipy.sparse as sp

MAX_BINS = 256  # bins are stored as uint8
_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS
_SALT_SUBSET = 0x9E3779B97F4A7C15
# position of the lowest set bit by a De Bruijn sequence (Leiserson et al. 1998)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.zeros(64, np.int64)
_BIT_OF[[(0x03F79D71B4CB0A89 << _bit) >> 58 & 63 for _bit in range(64)]] = np.arange(64)


@dataclass(frozen=True)
class TokenizerConfig:
    """How cells become tokens.

    Parameters
    ----------
    n_bins
        Size of the value scale: non-zero values get the bins 1 to ``n_bins - 1``. scGPT: 51.
    max_length
        Most tokens a cell may have, ``<cls>`` included; beyond it a random subset of its genes stays. scGPT: 1,200.
    seed
        Seed of ties and subsets, 0 or more.
    ties
        ``"random"`` as scGPT does, or ``"mid"``: the middle of the bins a tie may get, no randomness.
    duplicates
        Genes that share one token: ``"sum"`` their values (on the linear scale) or keep the ``"first"``.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    n_bins: int = 51
    max_length: int = 1200
    seed: int = 0
    ties: Literal["random", "mid"] = "random"
    duplicates: Literal["sum", "first"] = "sum"

    def __post_init__(self) -> None:
        if not 3 <= self.n_bins <= MAX_BINS:
            raise ValueError(f"n_bins must be between 3 and {MAX_BINS}, found {self.n_bins}.")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 (<cls> and one gene), found {self.max_length}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, found {self.seed}.")
        if self.ties not in ("random", "mid"):
            raise ValueError(f"ties must be 'random' or 'mid', found {self.ties!r}.")
        if self.duplicates not in ("sum", "first"):
            raise ValueError(f"duplicates must be 'sum' or 'first', found {self.duplicates!r}.")

    @classmethod
    def from_args(cls, args: Mapping[str, Any], **given: Any) -> TokenizerConfig:
        """What the ``args.json`` of a checkpoint says (``n_bins``, ``max_seq_len``), unless given and not None."""
        settings = {"n_bins": args.get("n_bins"), "max_length": args.get("max_seq_len")} | {
            name: value for name, value in given.items() if value is not None
        }
        return cls(**{name: value for name, value in settings.items() if value is not None})

    def draw(self, number: int) -> TokenizerConfig:
        """The same with another seed, for draw ``number`` of several."""
        return replace(self, seed=self.seed + number)


@dataclass(frozen=True)
class Tokens:
    """Tokens of many cells, ragged: cell ``i`` owns ``indptr[i]:indptr[i + 1]``, in ascending token id.

    ``<cls>`` is not stored; batches put it in front.

    Parameters
    ----------
    indptr
        int64 ``[cells + 1]``.
    gene_ids
        int32 ``[tokens]``, vocabulary ids.
    bins
        uint8 ``[tokens]``, 1 to ``n_bins - 1``.
    cell_keys
        uint64 ``[cells]``, hash of a cell's genes and the order of their values; independent of seed and position.
    n_expressed
        int32 ``[cells]``, known genes with a value, before ``max_length``.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    bins: np.ndarray
    cell_keys: np.ndarray
    n_expressed: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[cells]``: tokens of each cell, ``<cls>`` not counted."""
        return np.diff(self.indptr)

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, index: Any) -> Tokens:
        """The cells at ``index`` (slice, integers or mask), in that order."""
        rows = np.arange(self.n_cells)[index]
        rows = np.atleast_1d(rows)
        lengths = self.lengths[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.indptr[rows] - indptr[:-1], lengths) + np.arange(indptr[-1])
        return Tokens(indptr, self.gene_ids[source], self.bins[source], self.cell_keys[rows], self.n_expressed[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Tokens]) -> Tokens:
        """Cells of ``parts`` one after another."""
        lengths = [part.lengths for part in parts]
        return cls(
            np.concatenate([[0], np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths]))]).astype(np.int64),
            np.concatenate([np.empty(0, np.int32), *(part.gene_ids for part in parts)]).astype(np.int32, copy=False),
            np.concatenate([np.empty(0, np.uint8), *(part.bins for part in parts)]).astype(np.uint8, copy=False),
            np.concatenate([np.empty(0, np.uint64), *(part.cell_keys for part in parts)]),
            np.concatenate([np.empty(0, np.int32), *(part.n_expressed for part in parts)]),
        )

    def fingerprint(self) -> str:
        """Hex digest of the content: equal tokens in equal order, equal digest."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.indptr, self.gene_ids, self.bins):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def tokenize(
    matrix: Any,
    token_ids: np.ndarray,
    config: TokenizerConfig | None = None,
    *,
    log_values: bool = False,
) -> Tokens:
    """Tokenize the rows of one CSR matrix.

    Parameters
    ----------
    matrix
        CSR, cells x genes, values finite and not negative; explicit zeros count as zero.
    token_ids
        int ``[genes]``: vocabulary id of each column, -1 where the vocabulary does not know the gene.
    config
        Bins, length, seed, ties and duplicates; scGPT's by default.
    log_values
        The values are log1p: duplicates are then summed on the linear scale.

    Returns
    -------
    Tokens
        One ragged row per cell; a cell without any known gene has no tokens.

    Raises
    ------
    TypeError
        If ``matrix`` is not CSR.
    ValueError
        If ``token_ids`` does not have one entry per column.

    Example
    -------
    >>> import numpy as np, scipy.sparse as sp
    >>> cells = sp.csr_matrix(np.array([[0, 3, 1], [2, 0, 0]], dtype=np.float32))
    >>> tokenize(cells, np.array([7, 2, -1])).gene_ids
    array([2, 7], dtype=int32)
    """
    config = config or TokenizerConfig()
    if not (sp.issparse(matrix) and matrix.format == "csr"):
        raise TypeError(f"matrix must be a CSR matrix, found {type(matrix).__name__}; convert with scipy.sparse.")
    token_ids = np.asarray(token_ids)
    if token_ids.shape != (matrix.shape[1],):
        raise ValueError(f"token_ids has shape {token_ids.shape}, but matrix has {matrix.shape[1]} genes (columns).")
    genes = _GeneOrder(token_ids, config)
    return _tokenize_rows(matrix, genes, config, log_values)


def tokenize_chunks(
    chunks: Iterable[Any],
    token_ids: np.ndarray,
    config: TokenizerConfig | None = None,
    *,
    log_values: bool = False,
) -> Tokens:
    """Tokenize a matrix that comes as CSR pieces of consecutive rows; see :func:`tokenize`.

    The result does not depend on where the pieces are cut.
    """
    config = config or TokenizerConfig()
    genes = _GeneOrder(np.asarray(token_ids), config)
    return Tokens.concatenate([_tokenize_rows(chunk, genes, config, log_values) for chunk in chunks])


class _GeneOrder:
    """Columns of a matrix -> positions in ascending order of token id; duplicates share a position."""

    def __init__(self, token_ids: np.ndarray, config: TokenizerConfig) -> None:
        known = np.flatnonzero(token_ids >= 0)
        self.ids, first, position = np.unique(token_ids[known], return_index=True, return_inverse=True)
        self.ids = self.ids.astype(np.int32)
        self.position = np.full(len(token_ids), -1, dtype=np.int32)
        if config.duplicates == "first":
            self.position[known[first]] = np.arange(len(self.ids))
        else:
            self.position[known] = position


def _tokenize_rows(matrix: Any, genes: _GeneOrder, config: TokenizerConfig, log_values: bool) -> Tokens:
    if len(genes.position) != matrix.shape[1]:
        raise ValueError(f"token_ids has {len(genes.position)} entries, but matrix has {matrix.shape[1]} columns.")
    capacity = int(np.minimum(np.diff(matrix.indptr), config.max_length - 1).sum())
    n_cells = matrix.shape[0]
    gene_ids, bins = np.empty(capacity, np.int32), np.empty(capacity, np.uint8)
    indptr = np.zeros(n_cells + 1, np.int64)
    cell_keys, n_expressed = np.empty(n_cells, np.uint64), np.empty(n_cells, np.int32)
    _bin_rows(
        matrix.indptr,
        matrix.indices,
        matrix.data,
        genes.position,
        genes.ids,
        np.linspace(0, 1, config.n_bins - 1),
        config.max_length - 1,
        np.uint64(config.seed),
        config.ties == "random",
        log_values,
        indptr,
        gene_ids,
        bins,
        cell_keys,
        n_expressed,
    )
    used = indptr[-1]
    if used < capacity:  # unknown genes and zeros: give the slack back
        gene_ids, bins = gene_ids[:used].copy(), bins[:used].copy()
    return Tokens(indptr, gene_ids, bins, cell_keys, n_expressed)


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Bijective 64-bit mixing (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _radix_argsort(keys, n, order, swap, counts):  # type: ignore[no-untyped-def]
    """Stable argsort of ``keys[:n]`` (uint32) into ``order``: three passes of 11 bits, constant digits skipped."""
    counts[:] = 0
    for i in range(n):
        key = keys[i]
        for digit in range(3):
            counts[digit, (key >> np.uint32(_RADIX_BITS * digit)) & np.uint32(_RADIX - 1)] += 1
        order[i] = i
    source, target = order, swap
    for digit in range(3):
        shift = np.uint32(_RADIX_BITS * digit)
        if n == 0 or counts[digit, (keys[0] >> shift) & np.uint32(_RADIX - 1)] == n:
            continue
        total = 0
        for value in range(_RADIX):
            total, counts[digit, value] = total + counts[digit, value], total
        for i in range(n):
            item = source[i]
            value = (keys[item] >> shift) & np.uint32(_RADIX - 1)
            target[counts[digit, value]] = item
            counts[digit, value] += 1
        source, target = target, source
    return source


@numba.njit(nogil=True, cache=True)
def _fill_edges(values, order, n, quantiles, edges):  # type: ignore[no-untyped-def]
    """Quantiles of the values by linear interpolation, in float64 as NumPy computes them."""
    for k in range(len(quantiles)):
        at = (n - 1) * quantiles[k]
        below = int(at)
        above = min(below + 1, n - 1)
        part = at - below
        low, high = np.float64(values[order[below]]), np.float64(values[order[above]])
        edges[k] = high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


@numba.njit(nogil=True, cache=True)
def _bin_rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, position, ids, quantiles, max_genes, seed, random_ties, log_values,
    out_indptr, out_ids, out_bins, out_keys, out_expressed,
):  # fmt: skip
    n_genes = len(ids)
    row = np.zeros(n_genes, np.float32)
    present = np.zeros((n_genes + 63) // 64, np.uint64)
    slots = np.empty(n_genes, np.int32)
    values = np.empty(n_genes, np.float32)
    keys = values.view(np.uint32)
    order, swap = np.empty(n_genes, np.int32), np.empty(n_genes, np.int32)
    ranks, left, right = np.empty(n_genes, np.int32), np.empty(n_genes, np.int32), np.empty(n_genes, np.int32)
    counts = np.empty((3, _RADIX), np.int32)
    edges = np.empty(len(quantiles), np.float64)
    draws = np.empty(n_genes, np.uint64)
    seed_mixed = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
    one = np.uint64(1)
    used = 0
    for cell in range(len(indptr) - 1):
        for j in range(indptr[cell], indptr[cell + 1]):
            slot = position[indices[j]]
            value = np.float32(data[j])
            if slot < 0 or value == 0:
                continue
            word, bit = slot >> 6, one << np.uint64(slot & 63)
            if present[word] & bit:
                if log_values:
                    row[slot] = np.log1p(np.expm1(np.float64(row[slot])) + np.expm1(np.float64(value)))
                else:
                    row[slot] += value
            else:
                present[word] |= bit
                row[slot] = value
        n = 0
        for word in range(len(present)):
            bits = present[word]
            present[word] = 0
            while bits:
                lowest = bits & (~bits + one)
                slot = (word << 6) + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                slots[n] = slot
                values[n] = row[slot]
                n += 1
                bits ^= lowest
        out_expressed[cell] = n

        sorted_ = _radix_argsort(keys, n, order, swap, counts)
        if n > 0:
            _fill_edges(values, sorted_, n, quantiles, edges)
        n_edges, n_at_or_below, n_below, rank = len(edges), 0, 0, 0
        for i in range(n):
            item = sorted_[i]
            value = np.float64(values[item])
            if i > 0 and values[item] != values[sorted_[i - 1]]:
                rank += 1
            while n_at_or_below < n_edges and edges[n_at_or_below] <= value:
                n_at_or_below += 1
            while n_below < n_edges and edges[n_below] < value:
                n_below += 1
            left[item], right[item], ranks[item] = n_at_or_below, n_below, rank

        key = np.uint64(n)
        for i in range(n):
            key += _mix((np.uint64(ids[slots[i]]) << np.uint64(32)) + np.uint64(ranks[i]) + one)
        out_keys[cell] = key
        state = _mix(seed_mixed ^ key)

        threshold = np.uint64(0xFFFFFFFFFFFFFFFF)
        if n > max_genes:
            for i in range(n):
                draws[i] = _mix((state ^ np.uint64(_SALT_SUBSET)) + np.uint64(ids[slots[i]]))
            threshold = np.partition(draws[:n], max_genes - 1)[max_genes - 1]
        for i in range(n):
            if n > max_genes and draws[i] > threshold:
                continue
            width = left[i] - right[i]
            step = 0
            if width > 1:
                if random_ties:
                    draw = _mix(state + np.uint64(ids[slots[i]])) >> np.uint64(32)
                    step = np.int64((draw * np.uint64(width)) >> np.uint64(32))
                else:
                    step = width // 2
            out_ids[used] = ids[slots[i]]
            out_bins[used] = left[i] - step
            used += 1
        out_indptr[cell + 1] = used
