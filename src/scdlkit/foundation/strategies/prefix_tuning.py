"""``prefix_tuning``: trainable keys and values that every cell attends to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scdlkit.foundation.model import ScGPTEncoder

from ._config import Config, TrainingConfig, check_choice, check_number
from ._encoder import EncoderStrategy, block_numbers
from ._peft import check_layers
from ._registry import register


@dataclass(frozen=True)
class PrefixTuningConfig(Config):
    """Settings of prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    Parameters
    ----------
    length
        Trainable keys and values of a block.
    reparametrise
        Train them through a small MLP, which is folded away when the model is saved.
    hidden
        Width of that MLP.
    layers
        All blocks, or ``"last:k"``: what those below make of a cell is then computed once, and not in every epoch.
    head_layers
        Layers of the annotation head.
    training
        How it is trained; with learning rate 0.005 by default.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    strategy = "prefix_tuning"

    length: int = 4
    reparametrise: bool = False
    hidden: int = 64
    layers: str | None = None
    head_layers: int = 3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(learning_rate=5e-3))

    def __post_init__(self) -> None:
        check_number("length", self.length, low=1, integer=True)
        check_choice("reparametrise", self.reparametrise, (True, False))
        check_number("hidden", self.hidden, low=1, integer=True)
        check_number("head_layers", self.head_layers, low=1, integer=True)
        check_layers(self.layers)


class Prefix(nn.Module):
    """Further keys and values of one block, in front of those of the genes."""

    def __init__(self, length: int, n_heads: int, width: int, hidden: int | None, generator: torch.Generator) -> None:
        super().__init__()
        self.length, self.n_heads = length, n_heads
        # the scale of what the key and value projections give
        if hidden is None:
            self.key_values = nn.Parameter(torch.randn(2, length, width, generator=generator))
        else:
            self.seeds = nn.Parameter(torch.randn(length, hidden, generator=generator))
            self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2 * width))

    def table(self) -> Tensor:
        """Keys and values ``[2, length, width]``."""
        if hasattr(self, "mlp"):
            return self.mlp(self.seeds).unflatten(-1, (2, -1)).transpose(0, 1)
        return self.key_values

    def fold(self) -> None:
        """Replace the MLP by what it gives."""
        if hasattr(self, "mlp"):
            self.key_values = nn.Parameter(self.table().detach().clone())
            del self.mlp, self.seeds

    def forward(self, keys: Tensor, values: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``[B, heads, L, head width]`` and mask ``[B, 1, 1, L]`` with the prefix in front."""
        own = self.table().unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [2, heads, length, head width]
        own_keys, own_values = (part.expand(len(keys), -1, -1, -1).to(keys.dtype) for part in own)
        if keep is not None:
            keep = F.pad(keep, (self.length, 0), value=True)
        return torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2), keep


@register
class PrefixTuning(EncoderStrategy):
    """Freeze the encoder, train keys and values in front of every block's own, and the head."""

    name = "prefix_tuning"
    config_class = PrefixTuningConfig

    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Give every chosen block a prefix."""
        config, shape = self.config, encoder.config
        hidden = config.hidden if config.reparametrise else None
        generator = torch.Generator().manual_seed(torch.initial_seed())  # of this strategy, see EncoderStrategy.adapt
        for i in block_numbers(config.layers, len(encoder.blocks)):
            encoder.blocks[i].prefix = Prefix(config.length, shape.nheads, shape.embsize, hidden, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """Keys and values of every block; an MLP is folded away."""
        state = {name: value for name, value in super().state_dict().items() if ".prefix." not in name}
        for i, block in enumerate(self.encoder.blocks):
            if isinstance(block.prefix, Prefix):
                state[f"encoder.blocks.{i}.prefix.key_values"] = block.prefix.table().detach().cpu().clone()
        return state

    def prepare_loading(self) -> None:
        """What is saved holds no MLP."""
        for block in self.encoder.blocks:
            if isinstance(block.prefix, Prefix):
                block.prefix.fold()
