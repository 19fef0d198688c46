"""Linear layers of a frozen encoder on the CPU, their weights laid out once for the instructions of the machine."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ._frozen_kernels import quantise_rows, scale_products
from ._linear import has_onednn, multiply

_TYPICAL_ROWS = 1024  # for which oneDNN lays the weights out; any other number works


class FloatLinear:
    """``x @ weight.T + bias``, then ReLU if asked for, in float32 or bfloat16.

    Parameters
    ----------
    weight, bias
        ``[outputs, inputs]`` and ``[outputs]``; copied.
    dtype
        Of weights, inputs and outputs.
    relu
        Replace what is negative by zero.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, relu: bool = False) -> None:
        self.weight, self.bias = weight.detach().to(dtype).contiguous(), bias.detach().to(dtype)
        self.relu = relu
        self.packed = has_onednn(dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _TYPICAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, inputs]`` to ``[n, outputs]``."""
        if self.packed:
            return multiply(x, self.weight, self.bias, "relu" if self.relu else "none")
        result = F.linear(x, self.weight, self.bias)
        return result.relu_() if self.relu else result


class Int8Linear:
    """The same on bfloat16 with int8 products: one scale for each output's weights and for each row of the input.

    A scale for each row, instead of one for all, keeps a cell's result independent of its neighbours.
    Parameters as of :class:`FloatLinear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, relu: bool = False) -> None:
        weight = weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.weight = (weight / scale[:, None]).round().to(torch.int8).t()
        self.scale, self.bias = scale.numpy(), bias.detach().float().numpy()
        self.lowest = np.float32(0 if relu else -3e38)

    def __call__(self, x: Tensor) -> Tensor:
        """bfloat16 ``[n, inputs]`` to bfloat16 ``[n, outputs]``."""
        whole, unit = torch.empty(x.shape, dtype=torch.int8), np.empty(len(x), np.float32)
        quantise_rows(x.view(torch.uint16).numpy(), whole.numpy(), unit)
        products = torch._int_mm(whole, self.weight)
        out = torch.empty(products.shape, dtype=torch.bfloat16)
        scale_products(products.numpy(), unit, self.scale, self.bias, self.lowest, out.view(torch.uint16).numpy())
        return out
