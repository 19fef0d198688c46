"""The encoder once more, for inference on the CPU alone: the same numbers, two to five times as fast.

:class:`~scdlkit.foundation.model.ScGPTEncoder` is what trains, and what strategies change. Where nothing changes any
more, much of its work can be left out or done once:

- cells stand one behind the other, without padding, and attend within their own tokens;
- weights are laid out for the machine once, and may be bfloat16 or int8; both input embeddings are look-ups;
- attention is one loop over queries whose scores stay in the cache, its scale folded into the queries' weights;
- the last block answers for ``<cls>`` alone, so keys and values need not exist: q·(W x) = (Wᵀq)·x, and the mean of
  values is the value of a mean.

In float32 the result differs by rounding (1e-6 at most in tests). A cell's result does not depend on the others.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _frozen_kernels as kernels
from ._cell_attention import Scratch, as_array, attend_each
from ._dropout import Dropout
from ._fused_attention import attend_packed, can_fuse
from ._layer_norm import LayerNorm
from ._linear import Linear, computes_by_its_class
from ._packed_linear import FloatLinear, Int8Linear
from .batching import pack
from .model import Block, ScGPTEncoder, ValueEncoder
from .tokens import Tokens

CPUPrecision = Literal["fp32", "bf16", "int8"]

_ROWS = 32  # rows are a multiple of it: oneDNN keeps half a megabyte for every number of rows it has met


def is_plain(encoder: ScGPTEncoder) -> bool:
    """Whether this is exactly the pretrained architecture, with nothing put in that would be bypassed."""
    layers = {nn.Linear, Linear, nn.LayerNorm, LayerNorm, nn.Embedding, Dropout}
    plain = {*layers, nn.ModuleList, Block, ValueEncoder, ScGPTEncoder}
    return all(
        type(module) in plain and computes_by_its_class(module) and getattr(module, "prefix", None) is None
        for module in encoder.modules()
    )


def can_freeze(encoder: ScGPTEncoder) -> bool:
    """Whether an encoder on the CPU can be a :class:`FrozenEncoder`."""
    return is_plain(encoder) and all(
        # the loops here may do anything with NaN, the ones of PyTorch pass it on
        value.dtype is torch.float32 and value.device.type == "cpu" and bool(torch.isfinite(value).all())
        for value in encoder.parameters()
    )


class FrozenEncoder:
    """What an encoder computes for ``<cls>``, as of now: later changes of the encoder do not reach it.

    Safe to be called by several threads at once, each with its own :class:`Scratch`.

    Parameters
    ----------
    encoder
        On the CPU; see :func:`can_freeze`.
    precision
        ``"fp32"``; ``"bf16"``: products of bfloat16, sums, residuals and layer norms in float32; ``"int8"``: as bf16,
        but linear layers multiply int8.
    n_blocks
        Only this many, from the lowest: then :meth:`states` is what it computes.
    """

    def __init__(self, encoder: ScGPTEncoder, precision: CPUPrecision = "fp32", *, n_blocks: int | None = None) -> None:
        if not can_freeze(encoder):
            raise ValueError("This encoder was changed by a strategy, moved or cast; only a plain one can be frozen.")
        self.config = config = encoder.config
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        with torch.inference_mode():
            tables = encoder.input_tables()
            self.genes, self.values = tables.genes.numpy(), tables.values.numpy()
            self.row_of = encoder.row_of.numpy()
            blocks = list(encoder.blocks[: len(encoder.blocks) - 1 if n_blocks is None else n_blocks])
            self.blocks = [_FrozenBlock(block, precision) for block in blocks]  # type: ignore[arg-type]
            self.last = _ClsBlock(encoder.blocks[-1]) if n_blocks is None else None  # type: ignore[arg-type]
        self.nheads, self.embsize, self.pad_value = config.nheads, config.embsize, config.pad_value

    def __call__(self, tokens: Tokens, cls_id: int, scratch: Scratch) -> np.ndarray:
        """Cell embeddings float32 ``[cells, embsize]``: the output at ``<cls>``, not normalised."""
        if self.last is None:
            raise RuntimeError(f"Only the lowest {len(self.blocks)} blocks are here; call states().")
        x, starts = self._run(tokens, cls_id, scratch)
        with torch.inference_mode():
            return self.last(torch.from_numpy(x), starts)

    def states(self, tokens: Tokens, cls_id: int, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
        """What the blocks, but for the last one of all, make of every token.

        Returns
        -------
        ndarray
            float32 ``[tokens, embsize]``, the cells one behind the other, each with its ``<cls>`` first.
        ndarray
            int64 ``[cells + 1]``, where each begins and ends.
        """
        x, starts = self._run(tokens, cls_id, scratch)
        return x[: starts[-1]], starts

    def _run(self, tokens: Tokens, cls_id: int, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`states`, with a few rows more, which mean nothing."""
        gene_ids, values, starts = pack(tokens, cls_id=cls_id, pad_value=self.pad_value)
        x = np.zeros((-(-len(gene_ids) // _ROWS) * _ROWS, self.embsize), np.float32)
        kernels.add_rows(self.genes, self.row_of[gene_ids], self.values, values - self.pad_value, x[: len(gene_ids)])
        with torch.inference_mode():
            short = _rounded(x) if self.dtype is torch.bfloat16 else torch.from_numpy(x)
            for block in self.blocks:
                short = block(x, short, starts, scratch)
        return x, starts


class _FrozenBlock:
    """A block for all positions."""

    def __init__(self, block: Block, precision: CPUPrecision) -> None:
        def linear(weight: Tensor, bias: Tensor, *, relu: bool = False) -> FloatLinear | Int8Linear:
            if precision == "int8":
                return Int8Linear(weight, bias, relu=relu)
            return FloatLinear(weight, bias, torch.float32 if precision == "fp32" else torch.bfloat16, relu=relu)

        query, query_bias = _scaled_queries(block)
        self.nheads = block.nheads
        self.qkv = linear(
            torch.cat([query, block.k.weight, block.v.weight]), torch.cat([query_bias, block.k.bias, block.v.bias])
        )
        self.out = linear(block.out.weight, block.out.bias)
        self.fc1 = linear(block.fc1.weight, block.fc1.bias, relu=True)
        self.fc2 = linear(block.fc2.weight, block.fc2.bias)
        self.norm1, self.norm2 = _numbers(block.norm1), _numbers(block.norm2)

    def __call__(self, x: np.ndarray, short: Tensor, starts: np.ndarray, scratch: Scratch) -> Tensor:
        """Change ``x`` in place; ``short``, given and returned, is ``x`` in the precision of the products."""
        attended = _attend(self.qkv(short), self.nheads, starts, scratch)
        short = _add_and_norm(x, short, self.out(attended), self.norm1)
        return _add_and_norm(x, short, self.fc2(self.fc1(short)), self.norm2)


class _ClsBlock:
    """The last block, float32, for the first token of each cell."""

    def __init__(self, block: Block) -> None:
        nheads = block.nheads
        query, self.query_bias = _scaled_queries(block)
        self.query = query.clone()
        self.keys = block.k.weight.unflatten(0, (nheads, -1)).clone()  # [heads, width, embsize]
        self.values = block.v.weight.unflatten(0, (nheads, -1)).transpose(1, 2).clone()
        self.values_bias, self.out = block.v.bias.clone(), _copy(block.out)
        self.fc1, self.fc2 = _copy(block.fc1), _copy(block.fc2)
        self.norm1, self.norm2 = _numbers(block.norm1), _numbers(block.norm2)

    def __call__(self, x: Tensor, starts: np.ndarray) -> np.ndarray:
        """``x`` of all tokens to the outputs ``[cells, embsize]``."""
        cls = x[torch.from_numpy(starts[:-1])]
        queries = F.linear(cls, self.query, self.query_bias).unflatten(1, (len(self.keys), -1)).transpose(0, 1)
        looked_for = torch.bmm(queries, self.keys).transpose(0, 1).contiguous()  # [cells, heads, embsize]
        means = torch.empty_like(looked_for)
        for cell, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
            weights = (looked_for[cell] @ x[start:stop].t()).mul_(math.log(2)).softmax(1)
            torch.mm(weights, x[start:stop], out=means[cell])
        attended = torch.bmm(means.transpose(0, 1), self.values).transpose(0, 1).flatten(1) + self.values_bias
        result = cls.numpy()
        kernels.add_and_norm(result, self.out(attended).numpy(), *self.norm1)
        hidden = self.fc2(self.fc1(torch.from_numpy(result)).relu_())
        kernels.add_and_norm(result, hidden.numpy(), *self.norm2)
        return result


def _attend(qkv: Tensor, nheads: int, starts: np.ndarray, scratch: Scratch) -> Tensor:
    """Attention of each cell within itself.

    Parameters
    ----------
    qkv
        ``[tokens, 3 x embsize]``: queries, scaled by log2(e) / sqrt(width), keys, values.
    nheads
        Heads, side by side in each of the three.
    starts
        int64 ``[cells + 1]``: first token of each cell.
    scratch
        Of this thread.

    Returns
    -------
    Tensor
        ``[tokens, embsize]``.
    """
    embsize = qkv.shape[1] // 3
    out = torch.empty((len(qkv), embsize), dtype=qkv.dtype)
    out[starts[-1] :] = 0
    write = attend_packed if can_fuse(qkv.dtype, embsize // nheads) else attend_each
    write(qkv, nheads, starts, out, scratch)
    return out


def _scaled_queries(block: Block) -> tuple[Tensor, Tensor]:
    """Weight and bias of the queries times log2(e) / sqrt(width of a head): the softmax works with powers of two."""
    factor = math.log2(math.e) / math.sqrt(block.q.out_features // block.nheads)
    return block.q.weight.detach() * factor, block.q.bias.detach() * factor


def _add_and_norm(x: np.ndarray, short: Tensor, delta: Tensor, norm: tuple[np.ndarray, np.ndarray]) -> Tensor:
    if delta.dtype is torch.float32:
        kernels.add_and_norm(x, delta.numpy(), *norm)
    else:
        kernels.add_and_norm_bf16(x, as_array(delta), *norm, as_array(short))
    return short


def _rounded(x: np.ndarray) -> Tensor:
    short = torch.empty(x.shape, dtype=torch.bfloat16)
    kernels.round_bf16(x, as_array(short))
    return short


def _numbers(norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    return norm.weight.detach().clone().numpy(), norm.bias.detach().clone().numpy()


def _copy(linear: nn.Linear) -> FloatLinear:
    return FloatLinear(linear.weight, linear.bias, torch.float32)
