"""Cells one behind the other in a batch, without padding, and attention within each of them on a CUDA device."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._overlap import to_device

_VARLEN = "torch.nn.attention.varlen"  # of PyTorch since 2.10
AMPERE = (8, 0)  # the first GPUs that have bfloat16 and flash attention
_EIGHTS, _WIDEST_HEAD = 8, 256  # a head's width is a multiple of one and at most the other


class Packed(NamedTuple):
    """Where the cells of a batch are among its tokens, ``<cls>`` first in each."""

    starts: Tensor  # int32 [cells + 1]
    longest: int  # tokens
    alike: bool  # all are as long, as in many other batches

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return self._replace(starts=to_device(self.starts, device))

    def first(self, x: Tensor) -> Tensor:
        """``[tokens, d]`` at ``<cls>``, ``[cells, d]``."""
        return x.index_select(0, self.starts[:-1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of each cell's queries ``[tokens, heads, head width]``, or of its ``<cls>`` alone, to its own keys."""
        n_cells = len(self.starts) - 1
        if self.alike:
            # a faster kernel, but PyTorch makes a plan for every shape, which takes 0.1 s
            q, k, v = (part.unflatten(0, (n_cells, -1)).transpose(1, 2) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        if len(q) == len(k):
            return _flash_kernel()(q, k, v, self.starts, self.starts, self.longest, self.longest)
        one_each = torch.arange(n_cells + 1, dtype=torch.int32, device=q.device)
        return _flash_kernel()(q, k, v, one_each, self.starts, 1, self.longest)


def can_attend(device: torch.device, head_width: int) -> bool:
    """Whether this device has :meth:`Packed.attend`, in half precision."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec(_VARLEN) is not None
        and torch.cuda.get_device_capability(device) >= AMPERE
        and head_width % _EIGHTS == 0
        and head_width <= _WIDEST_HEAD
    )


def _flash_kernel() -> Callable[..., Tensor]:
    # imports torch.compile, which takes seconds that others need not wait
    return importlib.import_module(_VARLEN).varlen_attn
