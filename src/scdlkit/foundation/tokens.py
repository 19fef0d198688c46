"""Turn rows of an expression matrix into scGPT tokens: genes and value bins, ragged, the same for a cell wherever it is.

A cell becomes its expressed genes that the vocabulary knows, each with the bin of its value: the edges are the
cell's own quantiles, so only the order of the values matters and counts, normalised counts and log1p give the same
tokens (Cui et al. 2024, https://doi.org/10.1038/s41592-024-02201-0). Two choices are random in scGPT, which bin a
value gets that several edges tie on and which genes stay when there are more than fit. Here both are hashes of
(seed, the cell's genes and the order of their values): cell order, batch and process change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from ._binning import MAX_TOKEN_ID, bin_rows

MAX_BINS = 256  # bins are stored as uint8


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
        for name in ("n_bins", "max_length", "seed"):  # n_bins and max_length may come from a file
            if not isinstance(getattr(self, name), int | np.integer):
                raise ValueError(f"{name} must be an integer, found {getattr(self, name)!r}.")
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
    """Tokens of many cells, ragged: cell ``i`` owns ``indptr[i]:indptr[i + 1]``, in the order of the matrix's columns.

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
        source = stretches(self.indptr[rows], lengths)
        return Tokens(indptr, self.gene_ids[source], self.bins[source], self.cell_keys[rows], self.n_expressed[rows])

    def load(self) -> Tokens:
        """These tokens: they are in memory already."""
        return self

    def genes(self) -> np.ndarray:
        """int32, sorted: every gene that one of the cells has."""
        seen = np.zeros(int(self.gene_ids.max(initial=-1)) + 1, dtype=bool)
        seen[self.gene_ids] = True
        return np.flatnonzero(seen).astype(np.int32)

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


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: ``lengths[i]`` positions from ``starts[i]`` on, one stretch after another."""
    positions = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    positions += np.arange(len(positions))
    return positions


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
    columns = _Columns(token_ids, config)
    return _tokenize_rows(matrix, columns, config, log_values)


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
    return Tokens.concatenate(list(tokenize_pieces(chunks, token_ids, config, log_values=log_values)))


def tokenize_pieces(
    chunks: Iterable[Any],
    token_ids: np.ndarray,
    config: TokenizerConfig | None = None,
    *,
    log_values: bool = False,
) -> Iterator[Tokens]:
    """The same as :func:`tokenize_chunks`, the tokens of one piece after another."""
    config = config or TokenizerConfig()
    columns = _Columns(np.asarray(token_ids), config)
    return (_tokenize_rows(chunk, columns, config, log_values) for chunk in chunks)


class _Columns:
    """What the kernel looks up by column: token id, and where to add up genes that share a token."""

    def __init__(self, token_ids: np.ndarray, config: TokenizerConfig) -> None:
        if len(token_ids) and token_ids.max() > MAX_TOKEN_ID:
            raise ValueError(f"token_ids must be at most {MAX_TOKEN_ID}, found {token_ids.max()}.")
        ids = np.where(token_ids < 0, -1, token_ids).astype(np.int32)
        known = np.flatnonzero(ids >= 0)
        self.home = np.arange(len(ids), dtype=np.int32)
        seen = np.zeros(ids.max(initial=0) + 1, dtype=bool)
        seen[ids[known]] = True
        self.shared = int(np.count_nonzero(seen)) < len(known)
        if self.shared:
            _, first, position = np.unique(ids[known], return_index=True, return_inverse=True)
            self.home[known] = known[first[position]]
            if config.duplicates == "first":
                ids[np.delete(known, first)] = -1
                self.shared = False
        self.ids = ids.view(np.uint32)
        self.all_known = bool((ids >= 0).all())


def _tokenize_rows(matrix: Any, columns: _Columns, config: TokenizerConfig, log_values: bool) -> Tokens:
    if len(columns.ids) != matrix.shape[1]:
        raise ValueError(f"token_ids has {len(columns.ids)} entries, but matrix has {matrix.shape[1]} columns.")
    capacity = int(np.minimum(np.diff(matrix.indptr), config.max_length - 1).sum())
    n_cells = matrix.shape[0]
    gene_ids, bins = np.empty(capacity, np.int32), np.empty(capacity, np.uint8)
    indptr = np.zeros(n_cells + 1, np.int64)
    cell_keys, n_expressed = np.empty(n_cells, np.uint64), np.empty(n_cells, np.int32)
    bin_rows(
        matrix.indptr,
        matrix.indices,
        np.ascontiguousarray(matrix.data, dtype=np.float32),
        columns.ids,
        columns.home,
        columns.all_known,
        columns.shared,
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
