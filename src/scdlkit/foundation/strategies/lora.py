"""``lora``: low-rank updates of Linear layers, through peft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_choice, check_number
from ._encoder import EncoderStrategy, block_numbers
from ._peft import check_layers, check_linears, inject
from ._registry import register


@dataclass(frozen=True)
class LoRAConfig(Config):
    """Settings of LoRA (Hu et al. 2022, https://arxiv.org/abs/2106.09685).

    Parameters
    ----------
    rank
        Rank of the update.
    alpha
        The update is scaled by ``alpha / rank`` (``alpha / sqrt(rank)`` for rsLoRA).
    dropout
        Dropout on the input of the update.
    target_modules
        Linear layers of a block that are updated: of ``q k v out fc1 fc2``.
    variant
        ``"lora"``; ``"dora"``: magnitude and direction apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353);
        ``"rslora"``: rank-stabilised scale (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732); ``"pissa"``: start
        from the principal singular vectors (Meng et al. 2024, https://arxiv.org/abs/2404.02948).
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

    strategy = "lora"

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q", "v")
    variant: Literal["lora", "dora", "rslora", "pissa"] = "lora"
    layers: str | None = None
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=3e-3))

    def __post_init__(self) -> None:
        check_number("rank", self.rank, low=1, integer=True)
        check_number("alpha", self.alpha, low=0, open_low=True)
        check_number("dropout", self.dropout, low=0, high=0.99)
        check_choice("variant", self.variant, ("lora", "dora", "rslora", "pissa"))
        check_number("head_layers", self.head_layers, low=1, integer=True)
        object.__setattr__(self, "target_modules", check_linears(self.target_modules))
        check_layers(self.layers)


@register
class LoRA(EncoderStrategy):
    """Freeze the encoder, train low-rank updates of some of its Linear layers and the head; starts as the identity."""

    name = "lora"
    config_class = LoRAConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Wrap the target layers with peft's."""
        from peft import LoraConfig

        config: LoRAConfig = self.config
        blocks = block_numbers(config.layers, len(encoder.blocks))
        inject(
            encoder,
            LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]
                lora_dropout=config.dropout,
                target_modules=[f"blocks.{i}.{name}" for i in blocks for name in config.target_modules],
                use_dora=config.variant == "dora",
                use_rslora=config.variant == "rslora",
            ),
        )
        if config.variant == "pissa":
            for i in blocks:
                for name in config.target_modules:
                    _start_from_principal_part(getattr(encoder.blocks[i], name))


def _start_from_principal_part(layer: Any) -> None:
    """Split the weight into its principal part, which trains, and the rest, which is frozen.

    The principal part of a matrix is unique, so loading a saved model splits the checkpoint in the same way.
    """
    weight, scaling = layer.base_layer.weight, layer.scaling["default"]
    rank = layer.r["default"]
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
        start = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight.sub_(start)
