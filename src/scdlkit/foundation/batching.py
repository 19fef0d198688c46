"""Padded batches of cells of about the same length, under a token budget."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokens import Tokens


class Batch(NamedTuple):
    """A padded batch: ``<cls>`` first, then the genes of each cell."""

    gene_ids: Tensor  # int64 [B, L]
    values: Tensor  # float32 [B, L]
    padding_mask: Tensor | None  # bool [B, L], True at padding; None where nothing is padded

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self))


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


def collate(tokens: Tokens, *, cls_id: int, pad_id: int, pad_value: int) -> Batch:
    """Pad the cells of ``tokens`` to the longest of them and put ``<cls>`` in front."""
    lengths = tokens.lengths
    width = int(lengths.max(initial=0)) + 1
    gene_ids = np.full((tokens.n_cells, width), pad_id, dtype=np.int64)
    values = np.full((tokens.n_cells, width), pad_value, dtype=np.float32)
    gene_ids[:, 0] = cls_id
    filled = np.arange(width) <= lengths[:, None]
    genes = filled.copy()
    genes[:, 0] = False
    gene_ids[genes] = tokens.gene_ids
    values[genes] = tokens.bins
    mask = None if filled.all() else torch.from_numpy(~filled)
    return Batch(torch.from_numpy(gene_ids), torch.from_numpy(values), mask)
