"""Attention for training on a CPU: cell by cell, through scores that stay in the cache, in the type of the queries.

PyTorch's takes twice as long in bfloat16, and with dropout three to five times, because it then keeps the weights of all
cells. In float32 without dropout and without padding it is as fast, and is what runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_kernels import go_back
from ._cell_attention import Scratch, as_array, attend, in_one_piece, pieces
from ._dropout import STEPS
from ._linear import has_onednn

_PADDING_PAYS = 0.9  # share of scores that is no padding; with less, leaving padding out pays in float32
# Scores: PyTorch's own threads go on waiting for work for some milliseconds, and are in the way of others.
_WORTH_A_THREAD = 1 << 20


def attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, but faster where it is slow.

    Parameters
    ----------
    query, key, value
        ``[B, heads, L, width]``; there may be more keys than queries, the further ones in front.
    keep
        bool ``[B, 1, 1, keys]``, False at padding, or None.
    dropout
        Probability that a weight is left out; on a CPU rounded to 1/256.

    Returns
    -------
    Tensor
        ``[B, heads, L, width]``; rows at padding mean nothing.
    """
    dropped = round(dropout * STEPS)
    on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and query.dtype is torch.bfloat16 and not has_onednn(torch.bfloat16):
        # PyTorch's products of bfloat16 are loops over single numbers there
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), keep, dropout).to(query.dtype)
    lengths = _lengths(query, key, keep) if on_cpu and _can_take(query, key, value, dropped) else None
    if lengths is None or not _is_faster(query, key, lengths, dropped):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout)
    seed = 0
    if dropped:  # from the generator of all dropout, which the training loop seeds
        seed = int(torch.randint(1 << 32, (), generator=torch.default_generator))
    return _Attention.apply(query, key, value, _How(lengths, dropped, seed))


def _can_take(query: Tensor, key: Tensor, value: Tensor, dropped: int) -> bool:
    """Whether :class:`_Attention` is made for this: for a way back, from more than ``<cls>``."""
    return (
        query.dtype is key.dtype is value.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and dropped < STEPS
        and query.shape[2] > 1
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    )


def _is_faster(query: Tensor, key: Tensor, lengths: list[int], dropped: int) -> bool:
    """Whether :class:`_Attention` is faster than PyTorch's, which computes padding, too."""
    n_threads, n_more = torch.get_num_threads(), key.shape[2] - query.shape[2]
    padded = query.shape[:3].numel() * key.shape[2]
    needed = query.shape[1] * sum(n_keys * (n_keys - n_more) for n_keys in lengths)
    if n_threads > 1 and needed < n_threads * _WORTH_A_THREAD:
        return False
    return query.dtype is torch.bfloat16 or dropped > 0 or needed < _PADDING_PAYS * padded


def _lengths(query: Tensor, key: Tensor, keep: Tensor | None) -> list[int] | None:
    """How many keys each cell has, the first ones; None where padding is anywhere else."""
    n_cells, n_keys = len(key), key.shape[2]
    if keep is None:
        return [n_keys] * n_cells
    real = keep[:, 0, 0]
    lengths = real.sum(1)
    behind = bool((real == (torch.arange(n_keys) < lengths[:, None])).all())
    fewest = n_keys - query.shape[2]  # without a single gene
    return lengths.tolist() if behind and int(lengths.min()) > fewest else None


class _How(NamedTuple):
    lengths: list[int]  # keys of each cell
    dropped: int  # of 256 weights
    seed: int


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
        n_cells, n_heads, n_queries, width = query.shape
        out = query.new_zeros((n_cells, n_queries, n_heads * width))  # padding stays zero
        logsum = torch.zeros((n_cells, n_heads, n_queries))
        factor, dropped = _factor(width), how.dropped

        def one(cell: int, scratch: Scratch) -> None:
            q, k, v = _cell(query, key, value, how.lengths[cell], cell)
            rows, level = _first_rows(how.seed, cell, query), logsum[cell, :, : q.shape[1]].numpy()
            attend(q, k, v, out[cell], scratch, factor=factor, logsum=level, dropped=dropped, first_rows=rows)

        _for_each(n_cells, one)
        ctx.how = how
        ctx.save_for_backward(query, key, value, out, logsum)
        return out.unflatten(2, (n_heads, width)).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsum = ctx.saved_tensors
        how: _How = ctx.how
        n_heads, width = query.shape[1], query.shape[3]
        delta = (slope.float() * out.unflatten(2, (n_heads, width)).transpose(1, 2).float()).sum(3)
        slopes = [_zeros_like(part) for part in (query, key, value)]
        factor, scale = _factor(width), np.float32(1 / math.sqrt(width))

        def one(cell: int, scratch: Scratch) -> None:
            q, k, v = _cell(query, key, value, how.lengths[cell], cell)
            n_queries, n_keys = q.shape[1], k.shape[1]
            of_out = in_one_piece(slope[cell, :, :n_queries])
            of_q, of_k, of_v = (part[cell] for part in slopes)
            level, mean, first_rows = logsum[cell].numpy(), delta[cell].numpy(), _first_rows(how.seed, cell, query)
            for heads, rows in pieces(n_heads, n_queries, n_keys, query.element_size()):
                n, size = heads.stop - heads.start, (heads.stop - heads.start, rows.stop - rows.start)
                asking, asked, first = q[heads, rows], of_out[heads, rows], first_rows[heads] + np.uint32(rows.start)
                weights = torch.bmm(asking, k[heads].mT, out=scratch("weights", query.dtype, *size, n_keys))
                of_scores = torch.bmm(asked, v[heads].mT, out=scratch("of_scores", query.dtype, *size, n_keys))
                go_back(
                    as_array(weights), as_array(of_scores), factor, scale, level[heads, rows], mean[heads, rows],
                    how.dropped, first,
                )  # fmt: skip
                of_q[heads, rows] = torch.bmm(of_scores, k[heads], out=scratch("of_q", query.dtype, *size, width))
                of_k[heads, :n_keys] += torch.bmm(
                    of_scores.mT, asking, out=scratch("of_k", query.dtype, n, n_keys, width)
                )
                of_v[heads, :n_keys] += torch.bmm(weights.mT, asked, out=scratch("of_v", query.dtype, n, n_keys, width))

        _for_each(len(query), one)
        return *(part.to(query.dtype) for part in slopes), None


def _factor(width: int) -> np.float32:
    """Of scores, whose powers of two are taken."""
    return np.float32(math.log2(math.e) / math.sqrt(width))


def _for_each(n_cells: int, one: Callable[[int, Scratch], None]) -> None:
    """Each cell on one thread, as many at a time as PyTorch has threads."""
    n_threads = min(torch.get_num_threads(), n_cells)
    cells = iter(range(n_cells))  # shared: next() of it is atomic

    def work() -> None:
        scratch = Scratch()
        for cell in cells:
            one(cell, scratch)

    if n_threads == 1:
        work()
        return

    def work_alone() -> None:
        torch.set_num_threads(1)
        with torch.no_grad():  # which is of a thread
            work()

    before = torch.get_num_threads()
    try:
        for done in [_pool(os.getpid(), n_threads).submit(work_alone) for _ in range(n_threads)]:
            done.result()
    finally:
        torch.set_num_threads(before)  # part of it is common to all threads


@cache
def _pool(process: int, n_threads: int) -> ThreadPoolExecutor:
    """Threads to keep: a new one would take long to start. A process that was forked needs its own."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scdlkit-attention")


def _cell(query: Tensor, key: Tensor, value: Tensor, n_keys: int, cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one cell, ``[heads, L, width]`` without padding."""
    n_queries = query.shape[2] - key.shape[2] + n_keys
    return (
        in_one_piece(query[cell, :, :n_queries]),
        in_one_piece(key[cell, :, :n_keys]),
        in_one_piece(value[cell, :, :n_keys]),
    )


def _first_rows(seed: int, cell: int, query: Tensor) -> np.ndarray:
    """Number of the first row of each head, uint32 ``[heads]``: among all rows, moved by the seed."""
    n_heads, n_queries = query.shape[1:3]
    return ((seed + (cell * n_heads + np.arange(n_heads)) * n_queries) & 0xFFFFFFFF).astype(np.uint32)


def _zeros_like(part: Tensor) -> Tensor:
    """Float32 for sums, heads side by side as in the output of a linear layer."""
    n_cells, n_heads, length, width = part.shape
    return torch.zeros((n_cells, length, n_heads, width)).transpose(1, 2)
