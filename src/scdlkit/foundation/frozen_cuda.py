"""The encoder once more, for inference on a CUDA device in half precision: less memory traffic, so twice as fast.

A GPU spends most of an autocast pass of scGPT on moving numbers: 512 wide, its products are small. So here

- cells stand one behind the other, without padding, and attend within their own tokens by flash attention;
- what goes from layer to layer is half precision, so no layer converts anything; float16 has eight times as many
  steps as bfloat16, and layer norms keep the numbers far from its limits;
- cells of one length go together where they can, for which attention is faster still;
- query, key and value are one product; ReLU is part of another, and residuals are added by the products themselves,
  which is why their biases are moved into the layer before: where a layer reads x + b, its own bias takes W b back;
- both input embeddings are look-ups, and the last block answers for ``<cls>`` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._packed import Packed, can_attend
from ._triton import kernels
from .batching import PackedBatch
from .frozen import is_plain
from .model import Block, ScGPTEncoder

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def can_run_packed(encoder: ScGPTEncoder, precision: str) -> bool:
    """Whether this encoder, where it is, can be a :class:`CUDAEncoder`."""
    device, config = encoder.gene_embedding.weight.device, encoder.config
    return precision in HALVES and can_attend(device, config.embsize // config.nheads) and is_plain(encoder)


class CUDAEncoder:
    """What an encoder computes for ``<cls>``, as of now: later changes of the encoder do not reach it.

    Parameters
    ----------
    encoder
        One that :func:`can_run_packed`, in eval mode.
    dtype
        Of what goes from layer to layer, and of the products.
    """

    def __init__(self, encoder: ScGPTEncoder, dtype: torch.dtype) -> None:
        self.pad_value, self.row_of = encoder.config.pad_value, encoder.row_of.clone()
        with torch.inference_mode():
            tables = encoder.input_tables()
            blocks: list[Block] = list(encoder.blocks)  # type: ignore[arg-type]
            after = [*(block.out.bias for block in blocks[1:]), torch.zeros_like(blocks[0].out.bias)]
            self.genes, self.values = (tables.genes + blocks[0].out.bias).to(dtype), tables.values.to(dtype)
            self.blocks = [_PackedBlock(block, bias, dtype) for block, bias in zip(blocks, after, strict=True)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Cell embeddings float32 ``[cells, embsize]`` on the device, not normalised, from a batch that is there."""
        with torch.inference_mode():
            x = F.embedding(self.row_of[batch.gene_ids], self.genes)
            x.add_(F.embedding(batch.values - self.pad_value, self.values))
            for block in self.blocks[:-1]:
                x = block(x, batch.cells)
            return self.blocks[-1](x, batch.cells, cls_only=True).float()


class _PackedBlock:
    """A block that reads and returns x + b: b is the bias of the next product whose result is added to it."""

    def __init__(self, block: Block, next_bias: Tensor, dtype: torch.dtype) -> None:
        self.nheads = block.nheads
        weight, bias = (
            torch.cat([getattr(part, n) for part in (block.q, block.k, block.v)]) for n in ("weight", "bias")
        )
        self.qkv = _Product(weight, bias - weight @ block.out.bias, dtype)
        self.fc1 = _Product(block.fc1.weight, block.fc1.bias - block.fc1.weight @ block.fc2.bias, dtype)
        self.out, self.fc2 = block.out.weight.to(dtype), block.fc2.weight.to(dtype)
        self.norm1 = _Norm(block.norm1, block.fc2.bias, dtype)
        self.norm2 = _Norm(block.norm2, next_bias, dtype)

    def __call__(self, x: Tensor, cells: Packed, *, cls_only: bool = False) -> Tensor:
        """``[tokens, d]``, or ``[cells, d]`` of ``<cls>`` alone; ``x`` is used up."""
        width = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.nheads, -1)).unbind(1)
        if cls_only:
            x, q = cells.first(x), cells.first(q)
        attended = cells.attend(q, k, v).reshape(-1, width)
        x = self.norm1(x.addmm_(attended, self.out.t()))
        return self.norm2(x.addmm_(self.fc1.relu(x), self.fc2.t()))


class _Norm:
    """A layer norm with something added to its result."""

    def __init__(self, norm: nn.LayerNorm, further: Tensor, dtype: torch.dtype) -> None:
        weight, bias = norm.weight.detach(), (norm.bias + further).detach()
        loops = kernels("_layer_norm_triton", weight.device) if weight.is_cuda else None
        self.run: Callable[..., Tensor] | None = None if loops is None else loops.layer_norm_
        if self.run is None:
            weight, bias = weight.to(dtype), bias.to(dtype)
        self.weight, self.bias, self.eps = weight.contiguous(), bias.contiguous(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)


class _Product:
    """A linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """With ReLU, in one kernel."""
        return torch._addmm_activation(self.bias, x, self.weight.t())
