"""Batches of cells under a token budget: of about the same length and padded, or one cell behind the other."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from ._overlap import host_copy, host_tensor, to_device
from ._packed import Packed
from .stored_tokens import AnyTokens, StoredTokens
from .tokens import Tokens

MAX_BATCH_TOKENS = {"cpu": 8_192, "cuda": 131_072, "mps": 32_768}  # of a padded batch, by device
_NO_PADDING = np.empty((0, 0), bool)


class Batch(NamedTuple):
    """A padded batch: ``<cls>`` first, then the genes of each cell."""

    gene_ids: Tensor  # int64 [B, L]
    values: Tensor  # float32 [B, L]
    padding_mask: Tensor | None  # bool [B, L], True at padding; None where nothing is padded

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        mask = None if self.padding_mask is None else to_device(self.padding_mask, device)
        return Batch(to_device(self.gene_ids, device), to_device(self.values, device), mask)


class PackedBatch(NamedTuple):
    """Cells one behind the other, ``<cls>`` first in each."""

    gene_ids: Tensor  # int32 [tokens]
    values: Tensor  # int32 [tokens], bins
    cells: Packed

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(to_device(self.gene_ids, device), to_device(self.values, device), self.cells.to(device))


class StateBatch(NamedTuple):
    """A batch of what frozen lower blocks made of the tokens."""

    states: Tensor  # float16 [B, L, embsize], or [tokens, embsize] of cells one behind the other
    cells: Tensor | Packed | None  # padding as of Batch, or where the cells are

    def to(self, device: torch.device) -> StateBatch:
        """The same batch on another device."""
        cells = to_device(self.cells, device) if isinstance(self.cells, Tensor) else self.cells
        return StateBatch(to_device(self.states, device), cells.to(device) if isinstance(cells, Packed) else cells)


AnyBatch = Batch | PackedBatch | StateBatch


def length_batches(lengths: np.ndarray, *, max_tokens: int, max_cells: int | None = None) -> list[np.ndarray]:
    """Group cells of similar length.

    Parameters
    ----------
    lengths
        int ``[cells]``: tokens of each cell, ``<cls>`` not counted.
    max_tokens
        Most tokens a padded batch may have, ``<cls>`` and padding included; a longer cell forms its own batch.
    max_cells
        Most cells a batch may have.

    Returns
    -------
    list of ndarray
        Positions of the cells of each batch, longest cells first (so memory peaks at the start). Every cell is in
        exactly one batch.

    Raises
    ------
    ValueError
        If a limit is below 1.
    """
    if max_tokens < 1 or (max_cells is not None and max_cells < 1):
        raise ValueError(f"max_tokens ({max_tokens}) and max_cells ({max_cells}) must be at least 1.")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[order[start]]) + 1
        size = max(1, max_tokens // longest)
        size = size if max_cells is None else min(size, max_cells)
        batches.append(order[start : start + size])
        start += size
    return batches


def packs(lengths: np.ndarray, *, max_tokens: int, max_cells: int | None = None) -> list[np.ndarray]:
    """Consecutive cells, as many as fit into ``max_tokens`` without padding; otherwise as :func:`length_batches`."""
    if max_tokens < 1 or (max_cells is not None and max_cells < 1):
        raise ValueError(f"max_tokens ({max_tokens}) and max_cells ({max_cells}) must be at least 1.")
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64) + 1)
    found, start = [], 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + max_tokens, side="right")))
        stop = stop if max_cells is None else min(stop, start + max_cells)
        found.append(np.arange(start, stop))
        start = stop
    return found


def collate(
    tokens: AnyTokens,
    rows: np.ndarray | None = None,
    *,
    cls_id: int,
    pad_id: int,
    pad_value: int,
    multiple: int = 1,
    device: torch.device | None = None,
) -> Batch:
    """Pad the cells at ``rows`` (all by default) to the longest of them and put ``<cls>`` in front.

    What is padded is as long as a ``multiple``, so that there are few shapes. The batch is on the host, in pinned memory if
    it is for a ``device`` that is a CUDA one.
    """
    if isinstance(tokens, StoredTokens):
        tokens, rows = (tokens if rows is None else tokens[rows]).load(), None
    rows = np.arange(tokens.n_cells) if rows is None else rows
    shortest, longest = _extremes(tokens.indptr, rows)
    is_padded = shortest < longest
    shape = len(rows), -(-(longest + 1) // multiple) * multiple if is_padded else longest + 1
    gene_ids, values = host_tensor(shape, torch.int64, device), host_tensor(shape, torch.float32, device)
    padding = host_tensor(shape, torch.bool, device) if is_padded else None
    arrays = gene_ids.numpy(), values.numpy(), _NO_PADDING if padding is None else padding.numpy()
    _pad(tokens.indptr, tokens.gene_ids, tokens.bins, rows, cls_id, pad_id, pad_value, *arrays)
    return Batch(gene_ids, values, padding)


def pack(tokens: Tokens, *, cls_id: int, pad_value: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells one behind the other, without padding.

    Returns
    -------
    ndarray, ndarray
        int64 ``[tokens]``: gene ids, ``<cls>`` in front of each cell, and values, ``pad_value`` at ``<cls>``.
    ndarray
        int64 ``[cells + 1]``, where each cell begins and ends.
    """
    starts = tokens.indptr + np.arange(tokens.n_cells + 1)
    first = np.zeros(starts[-1], dtype=bool)
    first[starts[:-1]] = True
    gene_ids, values = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    gene_ids[first], values[first] = cls_id, pad_value
    gene_ids[~first], values[~first] = tokens.gene_ids, tokens.bins
    return gene_ids, values, starts


def collate_packed(
    tokens: Tokens, *, cls_id: int, pad_value: int, usual: int, device: torch.device | None = None
) -> PackedBatch:
    """Cells one behind the other on the host, in pinned memory if they are for a CUDA ``device``.

    ``usual`` is how many genes the cells of many batches have.
    """
    gene_ids, values, starts = pack(tokens, cls_id=cls_id, pad_value=pad_value)
    cells = packed_cells(starts, usual=usual + 1, device=device)
    ids, bins = (host_copy(part, torch.int32, device) for part in (gene_ids, values))
    return PackedBatch(ids, bins, cells)


def packed_cells(starts: np.ndarray, *, usual: int, device: torch.device | None) -> Packed:
    """Where cells begin and end ``[cells + 1]``; ``usual`` is how many tokens those of many batches have."""
    lengths = np.diff(starts)
    on_host = host_copy(starts, torch.int32, device)
    return Packed(on_host, int(lengths.max(initial=0)), alike=bool((lengths == usual).all()))


@numba.njit(nogil=True, cache=True)
def _extremes(indptr, rows):  # type: ignore[no-untyped-def]
    """Lengths of the shortest and the longest cell; 0 where there is none."""
    if len(rows) == 0:
        return 0, 0
    shortest = longest = indptr[rows[0] + 1] - indptr[rows[0]]
    for row in rows:
        length = indptr[row + 1] - indptr[row]
        shortest, longest = min(shortest, length), max(longest, length)
    return shortest, longest


@numba.njit(nogil=True, cache=True)
def _pad(indptr, ids, bins, rows, cls_id, pad_id, pad_value, out_ids, out_values, out_padding):  # type: ignore[no-untyped-def]
    for i in range(len(rows)):
        start, stop = indptr[rows[i]], indptr[rows[i] + 1]
        n = stop - start
        _copy(ids[start:stop], bins[start:stop], out_ids[i, 1:], out_values[i, 1:])
        out_ids[i, 0], out_values[i, 0] = cls_id, pad_value
        out_ids[i, n + 1 :] = pad_id
        out_values[i, n + 1 :] = pad_value
        if len(out_padding) > 0:
            out_padding[i, : n + 1] = False
            out_padding[i, n + 1 :] = True


@numba.njit(nogil=True, cache=True)
def _copy(ids, bins, out_ids, out_values):  # type: ignore[no-untyped-def]
    for j in range(len(ids)):
        out_ids[j] = ids[j]
    for j in range(len(bins)):
        out_values[j] = bins[j]
