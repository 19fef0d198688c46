"""``adapter``: small bottleneck layers inside every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from scdlkit.foundation._dropout import Dropout
from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_choice, check_number
from ._encoder import EncoderStrategy, block_numbers
from ._peft import check_layers
from ._registry import register


@dataclass(frozen=True)
class AdapterConfig(Config):
    """Settings of bottleneck adapters.

    Parameters
    ----------
    bottleneck
        Width of the adapter.
    variant
        ``"houlsby"``: after attention and after the feed-forward (Houlsby et al. 2019,
        https://arxiv.org/abs/1902.00751); ``"pfeiffer"``: after the feed-forward alone (Pfeiffer et al. 2021,
        https://arxiv.org/abs/2005.00247).
    dropout
        Dropout on the bottleneck.
    layers
        All blocks, or ``"last:k"``: what those below make of a cell is then computed once, and not in every epoch.
    head_layers
        Layers of the annotation head.
    training
        How it is trained; with learning rate 0.003 by default.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "adapter"

    bottleneck: int = 32
    variant: Literal["houlsby", "pfeiffer"] = "houlsby"
    dropout: float = 0.0
    layers: str | None = None
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=3e-3))

    def __post_init__(self) -> None:
        check_number("bottleneck", self.bottleneck, low=1, integer=True)
        check_choice("variant", self.variant, ("houlsby", "pfeiffer"))
        check_number("dropout", self.dropout, low=0, high=0.99)
        check_number("head_layers", self.head_layers, low=1, integer=True)
        check_layers(self.layers)


class Adapted(nn.Module):
    """A Linear and, on its output, ``x + up(relu(down(x)))``; ``up`` starts at zero, so the start is the identity."""

    def __init__(self, base_layer: nn.Linear, bottleneck: int, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.out_features, bottleneck)
        self.up = nn.Linear(bottleneck, base_layer.out_features)
        self.dropout = Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        x = self.base_layer(x)
        return x + self.up(self.dropout(F.relu(self.down(x))))


@register
class Adapter(EncoderStrategy):
    """Freeze the encoder, train bottleneck adapters and the head; starts as the identity."""

    name = "adapter"
    config_class = AdapterConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Put an adapter behind ``fc2``, and behind ``out`` in Houlsby's variant, before the residual is added."""
        config: AdapterConfig = self.config
        places = ("out", "fc2") if config.variant == "houlsby" else ("fc2",)
        for i in block_numbers(config.layers, len(encoder.blocks)):
            for place in places:
                layer = getattr(encoder.blocks[i], place)
                setattr(encoder.blocks[i], place, Adapted(layer, config.bottleneck, config.dropout))
