"""Layer norm in half precision where autocast would have it in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`, but autocast does not turn half precision into float32 here: sums are float32 anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]``, normalised, in the type of ``x``."""
        if x.dtype is self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
