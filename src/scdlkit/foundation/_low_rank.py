"""What peft's LoRA adds to a plain layer, for those who compute it faster than layer by layer."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._dropout import Dropout
from ._linear import Linear, computes_by_its_class, is_plain

_PEFT = "peft.tuners.lora.layer"


class LowRank(NamedTuple):
    """A layer, and ``scale * up @ down`` of what dropout leaves of its input."""

    base: Linear
    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    scale: float
    dropout: float  # while training


def low_rank(layer: nn.Module) -> LowRank | None:
    """The parts of a layer of peft's that is LoRA as it was published and nothing more; None for all others."""
    peft = sys.modules.get(_PEFT)  # whoever has such a layer has imported it
    if peft is None or type(layer) is not peft.Linear or not computes_by_its_class(layer):
        return None
    found: Any = layer
    names = found.active_adapters
    if found.disable_adapters or found.merged or len(names) != 1:
        return None
    if names[0] not in found.lora_A or names[0] in found.lora_variant:
        return None
    base, down, up, dropout = (
        found.base_layer, *(parts[names[0]] for parts in (found.lora_A, found.lora_B, found.lora_dropout))
    )  # fmt: skip
    if not (is_plain(base) and all(is_plain(part, nn.Linear) and part.bias is None for part in (down, up))):
        return None
    if not (is_plain(dropout, Dropout) or is_plain(dropout, nn.Identity)):
        return None
    p = dropout.p if isinstance(dropout, Dropout) and dropout.training else 0.0
    return LowRank(base, down.weight, up.weight, found.scaling[names[0]], p)
