"""Attention of packed cells on a CPU in one loop: products in registers, scores of a few queries at a time in the cache.

For inference. PyTorch's products of matrices as narrow as a head reach two thirds of what a core can do.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ._cell_attention import Scratch, as_array
from ._lanes import (
    CAN_MULTIPLY,
    LANES,
    ROWS,
    VECTORS,
    add,
    copy,
    exp2,
    first,
    in_halves,
    in_type,
    interleave,
    larger,
    largest_of,
    load,
    multiply,
    product,
    size_of,
    splat,
    store,
    subtract,
    sum_of,
    transpose,
)

_compile = numba.njit(nogil=True, cache=True)
_inline = numba.njit(nogil=True, inline="always")
_QUERIES = 4 * ROWS  # at a time
_PANEL = VECTORS * LANES  # keys side by side
_TYPES = torch.float32, torch.bfloat16
_APART = 16  # words between rows of scores, whose length may be a power of two: they would share a place in the cache
_LOWEST = np.float32(-3e38)


def can_fuse(dtype: torch.dtype, width: int) -> bool:
    """Whether :func:`attend_packed` is for heads of this width on this machine."""
    return dtype in _TYPES and CAN_MULTIPLY[dtype.itemsize] and width * dtype.itemsize % (4 * LANES) == 0


def attend_packed(qkv: Tensor, n_heads: int, starts: np.ndarray, out: Tensor, scratch: Scratch) -> None:
    """Write the attention of each cell within itself.

    Parameters
    ----------
    qkv
        ``[tokens, 3 x embsize]``: queries, scaled by log2(e) / sqrt(width), keys, values; in one piece.
    n_heads
        Heads, side by side in each of the three.
    starts
        int64 ``[cells + 1]``: first token of each cell.
    out
        Filled up to ``starts[-1]``: ``[tokens, embsize]``.
    scratch
        Of this thread.
    """
    n_words, n_tokens = qkv.shape[1] * qkv.element_size() // (12 * n_heads), int(np.diff(starts).max())
    padded = -(-n_tokens // _PANEL) * _PANEL
    width, n_terms = qkv.shape[1] // (3 * n_heads), -(-n_tokens * qkv.element_size() // 4)
    words = {"keys": (padded, n_words), "values": (n_terms, width), "queries": (_QUERIES, n_words)}
    numbers = {"scores": (_QUERIES, padded + _APART), "attended": (_QUERIES, width), "rest": (_QUERIES,)}
    room = [scratch(name, torch.float32, *shape).numpy() for name, shape in (words | numbers).items()]
    _attend_packed(as_array(qkv), n_heads, starts, as_array(out), *room)


@_compile
def _attend_packed(qkv, n_heads, starts, out, keys, values, queries, scores, attended, rest):  # type: ignore[no-untyped-def]
    like, size = qkv[0, 0], size_of(qkv[0, 0])
    row, out_row = qkv.shape[1] * size, out.shape[1] * size
    width = qkv.shape[1] // (3 * n_heads)
    head = width * size  # bytes
    for cell in range(len(starts) - 1):
        n = starts[cell + 1] - starts[cell]
        for k in range(n_heads):
            query = qkv.ctypes.data + starts[cell] * row + k * head
            target = out.ctypes.data + starts[cell] * out_row + k * head
            _lay_out_keys(query + n_heads * head, row, n, head, keys.ctypes.data)
            _lay_out_values(query + 2 * n_heads * head, row, n, head, values.ctypes.data, like)
            for i in range(0, n, _QUERIES):
                some = min(_QUERIES, n - i)
                _copy_rows(query + i * row, row, some, head, queries.ctypes.data)
                _score(queries.ctypes.data, some, keys.ctypes.data, n, head, scores, like)
                for j in range(some):
                    rest[j] = _soften(scores.ctypes.data + j * 4 * scores.shape[1], n, like)
                _average(scores, some, values.ctypes.data, n, width, attended.ctypes.data, like)
                for j in range(some):
                    factor = splat(rest[j])
                    for d in range(0, width, LANES):
                        mean = multiply(load(attended.ctypes.data + 4 * (j * width + d)), factor)
                        store(target + (i + j) * out_row + d * size, in_type(mean, like), like)


@_inline
def _lay_out_keys(source, row, n, head, keys):  # type: ignore[no-untyped-def]
    """``[n, words]`` to ``[panels, words, _PANEL]``, the last key again where a vector is not full."""
    for i in range(0, n, LANES):
        panel, place = i // _PANEL * _PANEL * head, i % _PANEL * 4
        for byte in range(0, head, 4 * LANES):
            target = keys + panel + byte * _PANEL + place
            transpose(source + i * row + byte, row, n - i - 1, target, 4 * _PANEL)


@_inline
def _lay_out_values(source, row, n, head, values, like):  # type: ignore[no-untyped-def]
    """``[n, width]`` in one piece; in bfloat16 two of them in turns, the last one with itself if their number is odd."""
    if in_halves(like):
        for i in range(0, n, 2):
            following = source + min(i + 1, n - 1) * row
            for byte in range(0, head, 2 * LANES):
                interleave(source + i * row + byte, following + byte, values + i * head + 2 * byte)
    else:
        _copy_rows(source, row, n, head, values)


@_inline
def _copy_rows(source, row, n, head, target):  # type: ignore[no-untyped-def]
    for i in range(n):
        for byte in range(0, head, 4 * LANES):
            copy(source + i * row + byte, target + i * head + byte)


@_inline
def _score(queries, n_queries, keys, n, head, scores, like):  # type: ignore[no-untyped-def]
    """Products of queries and keys."""
    row = 4 * scores.shape[1]
    for first_key in range(0, n, _PANEL):
        vectors = min(VECTORS, (n - first_key + LANES - 1) // LANES)
        panel = keys + first_key * head
        for i in range(0, n_queries, ROWS):
            out = scores.ctypes.data + i * row + 4 * first_key
            product(vectors, queries + i * head, head, panel, 4 * _PANEL, head // 4, out, row, like)


@_inline
def _soften(row, n, like):  # type: ignore[no-untyped-def]
    """``n`` scores to 2^(score - highest), in place, in the type of ``like``; one by their sum."""
    highest = splat(_LOWEST)
    for j in range(0, n, LANES):
        highest = larger(highest, load(row + 4 * j))
    top, total, size = splat(largest_of(highest)), splat(np.float32(0)), size_of(like)
    full = n // LANES * LANES
    for j in range(0, full, LANES):
        power = in_type(exp2(subtract(load(row + 4 * j), top)), like)
        store(row + size * j, power, like)
        total = add(total, power)
    if full < n:
        power = first(in_type(exp2(subtract(load(row + 4 * full), top)), like), n - full)
        store(row + size * full, power, like)
        total = add(total, power)
    return np.float32(1) / sum_of(total)


@_inline
def _average(scores, n_queries, values, n, width, attended, like):  # type: ignore[no-untyped-def]
    """Sums of values, weighted."""
    row, n_terms = 4 * scores.shape[1], (n * size_of(like) + 3) // 4
    for i in range(0, n_queries, ROWS):
        for d in range(0, width, _PANEL):
            vectors = min(VECTORS, (width - d) // LANES)
            out = attended + 4 * (i * width + d)
            product(
                vectors, scores.ctypes.data + i * row, row, values + 4 * d, 4 * width, n_terms, out, 4 * width, like
            )
