"""Linear layers by oneDNN where that is faster: large products in float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._device import cpu_has_bf16

_WORTH_IT = 1 << 24  # multiplications; below, the detour through Python takes longer than is won


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, which multiplies by another library in float32; the result differs by rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not self._is_for_onednn(x):
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad):
            return _Product.apply(x, self.weight, self.bias)
        return multiply(x, self.weight, self.bias)

    def _is_for_onednn(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and x.dtype is self.weight.dtype is torch.float32
            and self.bias is not None
            and x.numel() * self.out_features >= _WORTH_IT
            and not torch.is_autocast_enabled("cpu")
            and has_onednn()
        )


def is_plain(layer: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Whether nothing was put into, around or on to a layer of this kind, so that its weights and numbers say all."""
    return type(layer) is kind and computes_by_its_class(layer)


def computes_by_its_class(module: nn.Module) -> bool:
    """Whether nothing hooks on to what a module computes or takes its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not (any(hooks) or "forward" in vars(module))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = slope.flatten(0, -2)
        return (
            multiply(slope.contiguous(), weight.t().contiguous(), None) if of_x else None,
            rows.t().mm(x.flatten(0, -2)) if of_weight else None,  # oneDNN would have to turn both around
            rows.sum(0) if of_bias else None,
        )


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether :func:`multiply` is there; for bfloat16 it needs instructions that not every CPU has."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and (dtype is not torch.bfloat16 or cpu_has_bf16())


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, then ``"relu"`` if asked for; ``weight`` as it is, or laid out for oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")
