"""Layer norm of half precision rows in one pass over the memory; PyTorch's takes twice as long on rows this short."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4  # of a program


@triton.jit
def _normalise(x, weight, bias, n_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < WIDTH)[None, :]
    at = x + rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - (tl.sum(values, axis=1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    factor = tl.load(weight + columns, mask=columns < WIDTH, other=0.0)
    shift = tl.load(bias + columns, mask=columns < WIDTH, other=0.0)
    tl.store(at, values * scale[:, None] * factor[None, :] + shift[None, :], mask=inside)


def layer_norm_(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the rows of a contiguous ``[n, d]`` in place; ``weight`` and ``bias`` are float32 ``[d]``."""
    n_rows, width = x.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):  # Triton takes the current one
        _normalise[(triton.cdiv(n_rows, _ROWS),)](
            x, weight, bias, n_rows, eps, WIDTH=width, BLOCK=block, ROWS=_ROWS, num_warps=4
        )
    return x
