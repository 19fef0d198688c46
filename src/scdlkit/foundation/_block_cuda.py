"""Steps of a block that trains on a CUDA device in half precision, with ways back that pass over the memory once.

PyTorch takes as long for what lies between the products of scGPT, 512 wide, as for the products: biases, dropout, residuals,
layer norms and their sums over all tokens are passes of their own there. Here a product leaves its bias to the step after
it, and hands on its input as well as its output: so the gradient that comes back by the other way is there when the product
needs something to add to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _block_triton as loops
from ._random import default_generator

if TYPE_CHECKING:
    from .model import Block


_LAYERS = "q", "k", "v", "out", "fc1", "fc2", "norm1", "norm2"
_PARTS = "weight", "bias"
_PARAMETERS = [f"{layer}.{part}" for layer in _LAYERS for part in _PARTS]


def projected(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
    """``x [..., in]`` by each of some layers ``[..., out]``, with biases or none at all; and ``x``, for what reads it too."""
    return _Projected.apply(x, len(weights), *weights, *biases)


def add_and_norm(x: Tensor, branch: Tensor, branch_bias: Tensor | None, norm: torch.nn.LayerNorm, p: float) -> Tensor:
    """``norm(x + dropout(branch + branch_bias))``."""
    return _AddAndNorm.apply(x, branch, branch_bias, norm.weight, norm.bias, norm.eps, p)


def relu_dropout(x: Tensor, bias: Tensor, p: float) -> Tensor:
    """``dropout(relu(x + bias))``."""
    return _ReluDropout.apply(x, bias, p)


def low_rank(x: Tensor, product: Tensor, down: Tensor, up: Tensor, scale: float, p: float) -> Tensor:
    """``product [..., out] + scale * dropout(x) [..., in] @ down.T @ up.T``."""
    return _LowRank.apply(x, product, down, up, scale, p)


def whole_block(block: Block, x: Tensor, p: float, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A block of plain layers with dropout ``p``; ``attend`` takes queries, keys and values ``[..., d]``."""
    parameters = [getattr(getattr(block, layer), part) for layer in _LAYERS for part in _PARTS]
    return _WholeBlock.apply(x, attend, p, block.norm1.eps, *parameters)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        weight, biases = _stacked(parameters[:n], x.dtype), parameters[n:]
        out = torch.addmm(_stacked(biases, x.dtype), rows, weight.t()) if biases else rows @ weight.t()
        ctx.save_for_backward(rows, weight)
        ctx.n, ctx.types = n, [part.dtype for part in parameters]
        return *out.view(*x.shape[:-1], n, -1).unbind(-2), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        n, (of_input, _, *needed) = ctx.n, ctx.needs_input_grad
        parts = [_rows(part) for part in slopes[:n]]
        found: list[Tensor | None] = [None] * len(needed)
        if n > 1 or any(needed[n:]):
            together, sums = loops.side_by_side(parts)
            found[n:] = sums.chunk(n)[: len(needed) - n]
        else:
            (together,) = parts
        if any(needed[:n]):
            found[:n] = (together.t() @ rows).chunk(n)
        # in place: the step that made this gradient has handed it over
        of_x = slopes[n].view_as(rows).addmm_(together, weight).view_as(slopes[n]) if of_input else None
        kept = (
            value.to(kind) if need and value is not None else None
            for value, kind, need in zip(found, ctx.types, needed, strict=True)
        )
        return of_x, None, *kept


class _WholeBlock(torch.autograd.Function):
    """All of the others in one, without what autograd and autocast do for each of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attend: Callable[..., Tensor], p: float, eps: float, *parameters: Tensor
    ) -> Tensor:
        rows, width = _rows(x), x.shape[-1]
        has = dict(zip(_PARAMETERS, parameters, strict=True))
        to_heads, heads_bias = (_stacked([has[f"{name}.{part}"] for name in "qkv"], x.dtype) for part in _PARTS)
        to_out, to_inner, to_x = (has[f"{name}.weight"].to(x.dtype) for name in ("out", "fc1", "fc2"))
        norm1, norm2 = ((has[f"{name}.weight"], has[f"{name}.bias"], eps) for name in ("norm1", "norm2"))
        seeds = _seeds(3, p, x.device)
        heads = torch.addmm(heads_bias, rows, to_heads.t()).view(*x.shape[:-1], 3, width)
        with torch.enable_grad():  # PyTorch knows the way back of attention
            asked = [part.detach().requires_grad_() for part in heads.unbind(-2)]
            attended = attend(*asked)
        found = _rows(attended.detach())
        middle, total1 = loops.add_and_norm(rows, found @ to_out.t(), has["out.bias"], *norm1, seeds[0], p)
        inner = loops.relu_dropout(middle @ to_inner.t(), has["fc1.bias"], seeds[1], p)
        out, total2 = loops.add_and_norm(middle, inner @ to_x.t(), has["fc2.bias"], *norm2, seeds[2], p)
        states, weights = (rows, found, total1, middle, inner, total2), (to_heads, to_out, to_inner, to_x)
        ctx.save_for_backward(*states, *weights, norm1[0], norm2[0])
        ctx.attended, ctx.asked, ctx.p, ctx.eps, ctx.seeds = attended, asked, p, eps, seeds
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, found, total1, middle, inner, total2, *weights = ctx.saved_tensors
        to_heads, to_out, to_inner, to_x, norm1, norm2 = weights
        eps, p, seeds = ctx.eps, ctx.p, ctx.seeds
        needed, grads = dict(zip(_PARAMETERS, ctx.needs_input_grad[4:], strict=True)), dict[str, Tensor]()

        def add_product(of_product: Tensor, x: Tensor, *layers: str) -> None:
            names = [f"{layer}.weight" for layer in layers]
            if any(needed[name] for name in names):
                grads.update(zip(names, (of_product.t() @ x).float().chunk(len(names)), strict=True))

        of_middle, of_branch, grads["norm2.weight"], grads["norm2.bias"], grads["fc2.bias"] = loops.add_and_norm_back(
            _rows(slope), total2, norm2, eps, seeds[2], p
        )
        add_product(of_branch, inner, "fc2")
        of_inner, grads["fc1.bias"] = loops.relu_dropout_back(of_branch @ to_x, inner, p)
        add_product(of_inner, middle, "fc1")
        of_middle.addmm_(of_inner, to_inner)
        of_x, of_branch, grads["norm1.weight"], grads["norm1.bias"], grads["out.bias"] = loops.add_and_norm_back(
            of_middle, total1, norm1, eps, seeds[0], p
        )
        add_product(of_branch, found, "out")
        parts = torch.autograd.grad(ctx.attended, ctx.asked, (of_branch @ to_out).view(ctx.attended.shape))
        del ctx.attended, ctx.asked  # this node outlives their use
        of_heads, sums = loops.side_by_side([_rows(part) for part in parts])
        grads["q.bias"], grads["k.bias"], grads["v.bias"] = sums.chunk(3)
        add_product(of_heads, rows, "q", "k", "v")
        if ctx.needs_input_grad[0]:
            of_x.addmm_(of_heads, to_heads)
        kept = (grads[name] if need else None for name, need in needed.items())
        return of_x.view(slope.shape), None, None, None, *kept


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        p: float,
    ) -> Tensor:
        ctx.eps, ctx.p, (ctx.seed,) = eps, p, _seeds(1, p, x.device)
        out, total = loops.add_and_norm(_rows(x), _rows(branch), branch_bias, weight, bias, eps, ctx.seed, p)
        ctx.save_for_backward(total, weight)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        of_x, of_branch, *sums = loops.add_and_norm_back(_rows(slope), total, weight, ctx.eps, ctx.seed, ctx.p)
        of_weight, of_bias, of_branch_bias = sums
        found = of_x.view(slope.shape), of_branch.view(slope.shape), of_branch_bias, of_weight, of_bias
        kept = (value if need else None for value, need in zip(found, ctx.needs_input_grad, strict=False))
        return *kept, None, None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, p: float) -> Tensor:
        (seed,) = _seeds(1, p, x.device)
        out = loops.relu_dropout(_rows(x), bias, seed, p)
        ctx.save_for_backward(out)
        ctx.p = p
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        of_x, of_bias = loops.relu_dropout_back(_rows(slope), out, ctx.p)
        return of_x.view(slope.shape), of_bias if ctx.needs_input_grad[1] else None, None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Tensor, down: Tensor, up: Tensor, scale: float, p: float) -> Tensor:
        rows, (seed,) = _rows(x), _seeds(1, p, x.device)
        to_inner, to_out = down.to(x.dtype), (scale * up).to(x.dtype)
        inner = _dropped(rows, seed, p) @ to_inner.t()
        ctx.save_for_backward(rows, inner, to_inner, to_out)
        ctx.scale, ctx.p, ctx.seed = scale, p, seed
        return torch.addmm(product.flatten(0, -2), inner, to_out.t()).view(*product.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, to_inner, to_out = ctx.saved_tensors
        (of_input, of_product, of_down, of_up, _, _), p, seed = ctx.needs_input_grad, ctx.p, ctx.seed
        of_out = _rows(slope)
        of_inner = of_out @ to_out
        return (
            _dropped(of_inner @ to_inner, seed, p).view(*slope.shape[:-1], -1) if of_input else None,
            of_out.view(slope.shape) if of_product else None,  # of which it may have made a copy
            (of_inner.t() @ _dropped(rows, seed, p)).float() if of_down else None,
            ctx.scale * (of_out.t() @ inner).float() if of_up else None,
            None,
            None,
        )


def _dropped(rows: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return loops.dropout(rows, seed, p) if p else rows


def _stacked(parts: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights or biases of layers as those of one."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _rows(x: Tensor) -> Tensor:
    """``[rows, width]``, one behind the other."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _seeds(n: int, p: float, device: torch.device) -> tuple[Tensor | None, ...]:
    """From the generator of all dropout on the device, where they stay: a step that is recorded draws others each time."""
    if not p:
        return (None,) * n
    return torch.randint(1 << 31, (n,), dtype=torch.int32, device=device, generator=default_generator(device)).unbind()
