"""``bitfit``: biases and layer norms alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_number
from ._encoder import EncoderStrategy, block_numbers
from ._peft import check_layers
from ._registry import register


@dataclass(frozen=True)
class BitFitConfig(Config):
    """Settings of BitFit (Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199), with layer norms.

    Parameters
    ----------
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

    strategy = "bitfit"

    layers: str | None = None
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=3e-3))

    def __post_init__(self) -> None:
        check_number("head_layers", self.head_layers, low=1, integer=True)
        check_layers(self.layers)


@register
class BitFit(EncoderStrategy):
    """Train the biases and layer norms of the blocks, and the head; all weights stay."""

    name = "bitfit"
    config_class = BitFitConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Thaw biases and norms of the chosen blocks; a bias on keys shifts all scores alike and stays frozen."""
        for i in block_numbers(self.config.layers, len(encoder.blocks)):
            for name, parameter in encoder.blocks[i].named_parameters():
                parameter.requires_grad = (name.endswith(".bias") or name.startswith("norm")) and name != "k.bias"
