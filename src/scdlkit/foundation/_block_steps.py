"""Steps of a block: its products and what lies between them, by PyTorch or, in half precision on a GPU, by our own loops.

A layer that something was put into or around (an adapter) is asked as a whole; plain ones give up their biases to the step
after them, and so do those that LoRA was put around.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._attention import attention
from ._dropout import Dropout
from ._layer_norm import LayerNorm
from ._linear import Linear, is_plain
from ._low_rank import LowRank, low_rank
from ._packed import AMPERE, Packed
from ._triton import kernels

if TYPE_CHECKING:
    from .model import Block

Cells = Tensor | Packed | None  # False at padded keys [B, 1, 1, L]; or where the cells are; None: nothing is padded


def projected(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``x`` by each of the layers; and ``x`` itself, to be read by what comes after."""
    if (loops := _loops(x)) is not None:
        known = [found for layer in layers if (found := _known(layer)) is not None]
        if len(known) == len(layers):
            weights, biases = ([getattr(base, part) for base, _ in known] for part in ("weight", "bias"))
            *products, x = loops.projected(x, weights, biases)
            pairs = zip(products, known, strict=True)
            return *(_updated(loops, x, product, update) for product, (_, update) in pairs), x
    plain = all(is_plain(layer) for layer in layers)
    inputs = in_autocast(x) if plain else x  # which would otherwise convert it for each layer
    return *(layer(inputs) for layer in layers), x


def attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    nheads: int,
    cells: Cells,
    dropout: float,
    prefix: nn.Module | None = None,
) -> Tensor:
    """Attention of each cell's queries ``[..., d]`` to its own keys, and to those of a ``prefix`` in front of them."""
    asking, keys, values = (part.unflatten(-1, (nheads, -1)) for part in (queries, keys, values))
    if isinstance(cells, Packed):
        if dropout or prefix is not None:
            raise ValueError("Cells without padding have no attention dropout and no prefix.")
        # layers with something put in may give another type
        return cells.attend(*(in_autocast(part) for part in (asking, keys, values))).flatten(-2)
    keep = cells
    asking, keys, values = (part.transpose(1, 2) for part in (asking, keys, values))
    if prefix is not None:
        keys, values, keep = prefix(keys, values, keep)
    return attention(asking, keys, values, keep, dropout).transpose(1, 2).flatten(2)


def in_one_step(block: Block, x: Tensor, cells: Cells, dropout: float) -> Tensor | None:
    """The whole block, which takes the host less time; None where it has to be asked layer by layer."""
    loops = _loops(x)
    layers = block.q, block.k, block.v, block.out, block.fc1, block.fc2
    if loops is None or block.prefix is not None or not all(is_plain(layer) for layer in layers):
        return None
    if not (is_plain(block.dropout, Dropout) and all(is_plain(norm, LayerNorm) for norm in (block.norm1, block.norm2))):
        return None
    p = _probability(block.dropout)
    return loops.whole_block(block, x, p, lambda q, k, v: attended(q, k, v, block.nheads, cells, dropout))


def add_and_norm(x: Tensor, layer: nn.Module, inputs: Tensor, norm: nn.LayerNorm, dropout: Dropout) -> Tensor:
    """``norm(x + dropout(layer(inputs)))``."""
    if (loops := _loops(x)) is None or not (is_plain(norm, LayerNorm) and is_plain(dropout, Dropout)):
        return norm(x + dropout(layer(inputs)))
    if (known := _known(layer)) is not None:
        base, update = known
        product = _updated(loops, inputs, F.linear(inputs, base.weight), update)
        return loops.add_and_norm(x, product, base.bias, norm, _probability(dropout))
    return loops.add_and_norm(x, layer(inputs).to(x.dtype), None, norm, _probability(dropout))


def hidden(x: Tensor, layer: nn.Module, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """``dropout(relu(layer(x)))``; and ``x`` itself."""
    known = _known(layer)
    if known is not None and is_plain(dropout, Dropout) and (loops := _loops(x)) is not None:
        base, update = known
        product, x = loops.projected(x, [base.weight], [])
        return loops.relu_dropout(_updated(loops, x, product, update), base.bias, _probability(dropout)), x
    return dropout(F.relu(layer(x))), x


def _known(layer: nn.Module) -> tuple[Linear, LowRank | None] | None:
    """A plain layer, and what LoRA adds to it; None for any other."""
    if isinstance(layer, Linear) and is_plain(layer):
        return layer, None
    update = low_rank(layer)
    return None if update is None else (update.base, update)


def _updated(loops: Any, inputs: Tensor, product: Tensor, update: LowRank | None) -> Tensor:
    if update is None:
        return product
    return loops.low_rank(inputs, product, update.down, update.up, update.scale, update.dropout)


def in_autocast(x: Tensor) -> Tensor:
    """``x`` in the type of autocast, where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _loops(x: Tensor) -> Any:
    """Our own steps, where they are faster: for half precision, with a way back, on a GPU."""
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    half = torch.is_autocast_enabled("cuda") and x.dtype is torch.get_autocast_dtype("cuda")
    return kernels("_block_cuda", x.device) if half and torch.cuda.get_device_capability(x.device) >= AMPERE else None


def _probability(dropout: Dropout) -> float:
    return dropout.p if dropout.training else 0.0
