"""Attention of one cell on a CPU, some heads and queries at a time, so that their scores stay in the cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._attention_kernels import put_heads, softmax

_SCORES = 1 << 21  # bytes of scores at a time
_FEWEST_QUERIES = 32


class Scratch:
    """Memory of one thread that every cell uses again."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Room for a tensor, whose numbers mean nothing yet."""
        size, part = math.prod(shape), (name, dtype)
        if part not in self._parts or len(self._parts[part]) < size:
            self._parts[part] = torch.empty(size, dtype=dtype)
        return self._parts[part][:size].view(shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    scratch: Scratch,
    *,
    factor: np.float32,
    logsum: np.ndarray = np.empty((0, 0), np.float32),
    dropped: int = 0,
    first_rows: np.ndarray = np.empty(0, np.uint32),
) -> None:
    """Write the attention of one cell.

    Parameters
    ----------
    query, key, value
        ``[heads, L, width]``; see :func:`in_one_piece`.
    out
        Filled: ``[queries, heads x width]``.
    scratch
        Of this thread.
    factor
        Of scores, whose powers of two are taken.
    logsum
        Filled, for a way back: float32 ``[heads, queries]``, see :func:`~scdlkit.foundation._attention_kernels.softmax`.
    dropped, first_rows
        How many of 256 weights are dropped, and uint32 ``[heads]``, the number of the first row of each head.
    """
    n_heads, n_queries, width = query.shape
    n_keys = key.shape[1]
    rest, numbers = np.empty((n_heads, n_queries), np.float32), as_array(out)
    for heads, rows in pieces(n_heads, n_queries, n_keys, query.element_size()):
        size = heads.stop - heads.start, rows.stop - rows.start
        weights = torch.bmm(query[heads, rows], key[heads].mT, out=scratch("weights", query.dtype, *size, n_keys))
        first = first_rows[heads] + np.uint32(rows.start) if dropped else first_rows
        softmax(as_array(weights), factor, logsum[heads, rows], rest[heads, rows], dropped, first)
        attended = torch.bmm(weights, value[heads], out=scratch("attended", query.dtype, *size, width))
        put_heads(as_array(attended), rest[heads, rows], rows.start, heads.start, numbers)


def attend_each(qkv: Tensor, n_heads: int, starts: np.ndarray, out: Tensor, scratch: Scratch) -> None:
    """As :func:`~scdlkit.foundation._fused_attention.attend_packed`, for every width and machine."""
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        query, key, value = in_one_piece(qkv[start:stop].view(stop - start, 3, n_heads, -1).permute(1, 2, 0, 3))
        attend(query, key, value, out[start:stop], scratch, factor=np.float32(1))


def pieces(n_heads: int, n_queries: int, n_keys: int, size: int) -> list[tuple[slice, slice]]:
    """Heads and queries that are computed at a time, where a score takes ``size`` bytes."""
    most = _SCORES // size
    heads = min(n_heads, max(1, most // (n_queries * n_keys)))
    step = n_queries if heads > 1 else min(n_queries, max(_FEWEST_QUERIES, most // n_keys))
    return [
        (slice(head, min(head + heads, n_heads)), slice(row, min(row + step, n_queries)))
        for head in range(0, n_heads, heads)
        for row in range(0, n_queries, step)
    ]


def in_one_piece(part: Tensor) -> Tensor:
    """bfloat16 in one piece: its products copy what is not, again for every product."""
    return part.contiguous() if part.dtype is torch.bfloat16 else part


def as_array(x: Tensor) -> np.ndarray:
    """The same memory, bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype is torch.bfloat16 else x).numpy()
