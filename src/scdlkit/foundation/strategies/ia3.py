"""``ia3``: learnt scales on keys, values and the feed-forward activation, through peft."""

from __future__ import annotations

from dataclasses import dataclass, field

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_number
from ._encoder import EncoderStrategy, block_numbers
from ._peft import check_layers, inject
from ._registry import register


@dataclass(frozen=True)
class IA3Config(Config):
    """Settings of IA3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638).

    Parameters
    ----------
    layers
        All blocks, or ``"last:k"``: what those below make of a cell is then computed once, and not in every epoch.
    head_layers
        Layers of the annotation head.
    training
        How it is trained; with learning rate 0.005 by default, as scales need larger steps than weights.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "ia3"

    layers: str | None = None
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=5e-3))

    def __post_init__(self) -> None:
        check_number("head_layers", self.head_layers, low=1, integer=True)
        check_layers(self.layers)


@register
class IA3(EncoderStrategy):
    """Freeze the encoder, train one scale for each key, value and feed-forward unit, and the head; starts as the identity."""

    name = "ia3"
    config_class = IA3Config

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Wrap k and v (their output is scaled) and fc2 (its input is) with peft's layers."""
        from peft import IA3Config as PeftIA3Config

        blocks = block_numbers(self.config.layers, len(encoder.blocks))
        feed_forward = [f"blocks.{i}.fc2" for i in blocks]
        targets = [f"blocks.{i}.{name}" for i in blocks for name in ("k", "v")]
        inject(encoder, PeftIA3Config(target_modules=targets + feed_forward, feedforward_modules=feed_forward))
