"""PyTorch's AdamW, without loading PyTorch's compiler.

``torch.optim`` marks its methods for ``torch.compile`` and imports it for that, which takes longer than training a head.
Nothing here compiles an optimizer, so the methods run without their marks.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """Same numbers, same state (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101)."""

    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    _step = staticmethod(inspect.unwrap(torch.optim.AdamW.step))

    def step(self, closure: Any = None) -> Any:
        """Change the parameters by their gradients."""
        with torch.no_grad():
            return self._step(self, closure)
