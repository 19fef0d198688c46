"""A fitted strategy as a checkpoint of its own, in the official layout, for upstream's code and others."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .model import AnnotationHead
from .strategies import FrozenProbe, Head, Strategy
from .strategies._adapted import AdaptedEncoder, merged
from .strategies._encoder import EncoderStrategy
from .vocabulary import Vocabulary
from .weights import detect_spelling, load_encoder, read_weights, save_checkpoint


def export_checkpoint(
    strategy: Strategy, checkpoint: Checkpoint, folder: str | os.PathLike[str], *, classes: Sequence[str]
) -> Path:
    """Write the adapted encoder, merged, with the annotation head as upstream's ``cls_decoder``.

    Parameters
    ----------
    strategy
        Fitted.
    checkpoint
        The checkpoint it was fitted on.
    folder
        New folder: ``args.json`` (with the class names in order as ``classes``), ``vocab.json``, ``best_model.pt``.
    classes
        Class names.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the strategy adds something to the encoder that the official layout has no place for (adapters, prefixes),
        or has no encoder or no head (a baseline), or ``folder`` is not empty.

    Example
    -------
    >>> runner.save("my_scgpt/", standalone=True)
    """
    encoder = load_encoder(checkpoint)
    if isinstance(strategy, EncoderStrategy):
        _take_over(encoder, strategy)
        module: AdaptedEncoder = strategy.trained_module()  # type: ignore[assignment]
        head, mean, scale = module.head, module.mean.cpu(), module.scale.cpu()
    elif isinstance(strategy, Head):
        state = strategy.state_dict()
        head, mean, scale = strategy.trained_module(), state["mean"], state["scale"]  # type: ignore[assignment]
    elif isinstance(strategy, FrozenProbe):
        head, mean, scale = _probe_as_head(strategy)
    else:
        why = "has no head that the official layout has a place for" if strategy.uses_encoder else "uses no encoder"
        raise ValueError(f"Strategy {strategy.name!r} {why}, so there is no checkpoint to write.")
    decoder, n_layers = _official_head(head, mean, scale)
    official = read_weights(checkpoint.weights_path)
    heads = {name: value.float() for name, value in official.items() if name.startswith(("decoder.", "mvc_decoder."))}
    args = {**checkpoint.args(), "n_layers_cls": n_layers, "classes": [str(name) for name in classes]}
    return save_checkpoint(
        folder,
        encoder.state_dict(),
        args=args,
        vocab=dict(Vocabulary.from_json(checkpoint.vocab_path).tokens),
        heads={**heads, **decoder},
        spelling=detect_spelling(official),
    )


def _take_over(encoder: nn.Module, strategy: EncoderStrategy) -> None:
    """Give the full pretrained encoder the adapted weights."""
    adapted = merged(strategy.encoder)
    if adapted is None:
        raise ValueError(
            f"Strategy {strategy.name!r} adds adapters or prefixes, which the official layout has no place for."
        )
    target, weights = encoder.state_dict(), adapted.state_dict()
    rows = torch.from_numpy(adapted.token_ids)
    with torch.no_grad():
        for name, value in target.items():
            if name == "gene_embedding.weight":
                value[rows] = weights[name]
            else:
                value.copy_(weights[name])


def _probe_as_head(strategy: FrozenProbe) -> tuple[AnnotationHead, Tensor, Tensor]:
    """A logistic regression is a head of one layer."""
    state = strategy.state_dict()
    coefficients, intercept = state["coef"], state["intercept"]
    head = AnnotationHead(coefficients.shape[1], len(coefficients), n_layers=1)
    with torch.no_grad():
        head.out.weight.copy_(coefficients)
        head.out.bias.copy_(intercept)
    return head, state["mean"], state["scale"]


def _official_head(head: nn.Module, mean: Tensor, scale: Tensor) -> tuple[dict[str, Tensor], int]:
    """Tensors under upstream's names, the standardisation folded into the first Linear; and the number of layers."""
    head = copy.deepcopy(head).cpu().double()
    first = next(module for module in head.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        first.weight.div_(scale.double())
        first.bias.sub_(first.weight @ mean.double())
    n_layers = sum(isinstance(module, nn.Linear) for module in head.modules())
    names = {"hidden.": "cls_decoder._decoder.", "out.": "cls_decoder.out_layer."}
    state = {}
    for name, value in head.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                state[theirs + name.removeprefix(ours)] = value.float()
    return state, n_layers
