"""Official scGPT state dicts <-> the engine's, strict in both directions.

The official files differ in the spelling of the attention projections (flash-attention's ``Wqkv``, PyTorch's
``in_proj_``, and a wrapped ``_impl.Wqkv``) and carry heads that annotation does not use. Every encoder tensor must be
there in the right shape; heads are known by name; anything else is an error, so no weight is ever skipped silently.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scdlkit._settings import logger

from .checkpoints import Checkpoint, ensure_checkpoint
from .model import ScGPTConfig, ScGPTEncoder
from .vocabulary import Vocabulary

# official prefixes of heads that the encoder does not need
HEADS = (
    "decoder.",
    "mvc_decoder.",
    "flag_encoder.",
    "cls_decoder.",
    "batch_encoder.",
    "grad_reverse_discriminator.",
)
QKV_SPELLINGS = {
    "Wqkv": ("self_attn.Wqkv.weight", "self_attn.Wqkv.bias"),
    "in_proj": ("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    "_impl.Wqkv": ("self_attn._impl.Wqkv.weight", "self_attn._impl.Wqkv.bias"),
}
_INPUT_NAMES = {
    "encoder.embedding.weight": "gene_embedding.weight",
    "encoder.enc_norm.weight": "gene_norm.weight",
    "encoder.enc_norm.bias": "gene_norm.bias",
    **{
        f"value_encoder.{theirs}.{part}": f"value_encoder.{ours}.{part}"
        for theirs, ours in (("linear1", "fc1"), ("linear2", "fc2"), ("norm", "norm"))
        for part in ("weight", "bias")
    },
}
_BLOCK_NAMES = {
    f"{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in (
        ("self_attn.out_proj", "out"),
        ("linear1", "fc1"),
        ("linear2", "fc2"),
        ("norm1", "norm1"),
        ("norm2", "norm2"),
    )
    for part in ("weight", "bias")
}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file, without executing anything in it.

    Raises
    ------
    ValueError
        If the file is corrupt, truncated, or holds something else than named tensors.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as PyTorch weights: it is corrupt, truncated or holds more than tensors "
            f"({type(error).__name__}). Fetch it again."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds {type(state).__name__}, not a flat dictionary of named tensors.")
    if state and all(name.startswith("module.") for name in state):  # written from a data-parallel wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def to_engine(official: Mapping[str, Tensor], config: ScGPTConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename an official state dict.

    Parameters
    ----------
    official
        Tensors under any of the official spellings.
    config
        Shape they must have.

    Returns
    -------
    tuple
        The encoder's state dict, and the tensors of the heads under their official names.

    Raises
    ------
    ValueError
        If encoder tensors are missing or misshapen, or names are unknown; all of them are listed.
    """
    expected = {name: tuple(t.shape) for name, t in _official_template(config, detect_spelling(official)).items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in official]
    problems += [
        f"shape: {name} is {tuple(official[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in official and tuple(official[name].shape) != shape
    ]
    heads = {name: tensor for name, tensor in official.items() if name.startswith(HEADS)}
    problems += [f"unknown: {name} {tuple(official[name].shape)}" for name in official.keys() - expected - heads.keys()]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"The weights do not fit the encoder that args.json and vocab.json describe:\n  {shown}")
    if heads:
        logger.debug("Not used for annotation: %d head tensors (%s).", len(heads), ", ".join(sorted(heads)))

    state: dict[str, Tensor] = {}
    for name in expected:
        if name in _INPUT_NAMES:
            state[_INPUT_NAMES[name]] = official[name]
            continue
        index, rest = name.removeprefix("transformer_encoder.layers.").split(".", 1)
        if rest in _BLOCK_NAMES:
            state[f"blocks.{index}.{_BLOCK_NAMES[rest]}"] = official[name]
        else:  # q, k and v are stacked along rows
            part = "weight" if rest.endswith("weight") else "bias"
            for ours, tensor in zip("qkv", official[name].chunk(3), strict=True):
                state[f"blocks.{index}.{ours}.{part}"] = tensor
    return state, heads


def to_official(state: Mapping[str, Tensor], *, spelling: str = "Wqkv") -> dict[str, Tensor]:
    """Rename an encoder's state dict back to the official layout; the inverse of :func:`to_engine`.

    Raises
    ------
    ValueError
        If ``spelling`` is unknown.
    """
    if spelling not in QKV_SPELLINGS:
        raise ValueError(f"spelling must be one of {', '.join(QKV_SPELLINGS)}, found {spelling!r}.")
    official = {theirs: state[ours] for theirs, ours in _INPUT_NAMES.items()}
    n_blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(n_blocks):
        prefix, block = f"transformer_encoder.layers.{index}", f"blocks.{index}"
        for theirs, part in zip(QKV_SPELLINGS[spelling], ("weight", "bias"), strict=True):
            official[f"{prefix}.{theirs}"] = torch.cat([state[f"{block}.{name}.{part}"] for name in "qkv"])
        official |= {f"{prefix}.{theirs}": state[f"{block}.{ours}"] for theirs, ours in _BLOCK_NAMES.items()}
    return official


def detect_spelling(official: Mapping[str, Tensor]) -> str:
    """How a state dict spells the attention projections; ``"Wqkv"`` if none is found."""
    for spelling, (weight, _) in QKV_SPELLINGS.items():
        if f"transformer_encoder.layers.0.{weight}" in official:
            return spelling
    return "Wqkv"


def load_encoder(
    checkpoint: str | os.PathLike[str] | Checkpoint, *, token_ids: np.ndarray | None = None
) -> ScGPTEncoder:
    """Load the pretrained encoder of a checkpoint.

    Parameters
    ----------
    checkpoint
        Registered name, folder in the official layout, or what :func:`ensure_checkpoint` returned.
    token_ids
        Vocabulary ids in use: only their rows of the gene embedding are kept (with ``<cls>`` and ``<pad>``), which
        changes no result. All by default.

    Returns
    -------
    ScGPTEncoder
        float32, on the CPU, in eval mode.

    Raises
    ------
    ValueError
        If a file is corrupt, or a tensor is missing, misshapen or not finite; names (and shapes) are listed.

    Example
    -------
    >>> from scdlkit.foundation import load_encoder
    >>> load_encoder("mini").config.nlayers  # doctest: +SKIP
    """
    found = checkpoint if isinstance(checkpoint, Checkpoint) else ensure_checkpoint(checkpoint)
    vocabulary = Vocabulary.from_json(found.vocab_path)
    config = ScGPTConfig.from_args(found.args(), n_tokens=len(vocabulary))
    state, _ = to_engine(read_weights(found.weights_path), config)
    if token_ids is not None:
        token_ids = np.union1d(token_ids[token_ids >= 0], [vocabulary.cls_id, vocabulary.pad_id])
        state["gene_embedding.weight"] = state["gene_embedding.weight"][torch.from_numpy(token_ids.astype(np.int64))]
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        encoder = ScGPTEncoder(config, token_ids)
    own = {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in state.items()}
    if broken := [name for name, tensor in own.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{found.weights_path} has NaN or infinite weights: {', '.join(broken[:20])}. Fetch it again.")
    encoder.load_state_dict(own, strict=True, assign=True)
    logger.debug("Loaded %s: %d layers, %d gene rows.", found.name, config.nlayers, len(encoder.token_ids))
    return encoder.eval()


def save_checkpoint(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    args: Mapping[str, Any],
    vocab: Mapping[str, int],
    heads: Mapping[str, Tensor] | None = None,
    spelling: str = "Wqkv",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an encoder as an official three-file checkpoint: ``args.json``, ``vocab.json``, ``best_model.pt``.

    Parameters
    ----------
    folder
        Target; must not exist yet, or be empty. Appears complete or not at all.
    state
        State dict of a :class:`ScGPTEncoder` with the full vocabulary.
    args, vocab
        Contents of the two JSON files.
    heads
        Further tensors under official names, such as ``decoder.fc.0.weight``.
    spelling
        ``"Wqkv"`` as in whole-human, ``"in_proj"`` or ``"_impl.Wqkv"``.
    dtype
        Cast to this type, such as ``torch.float16``; unchanged by default.

    Raises
    ------
    ValueError
        If the tensors do not have the shape that ``args`` and ``vocab`` describe, or ``folder`` is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder {folder} is not empty; choose a new one.")
    official = {**to_official(state, spelling=spelling), **(heads or {})}
    to_engine(official, ScGPTConfig.from_args(args, n_tokens=max(vocab.values()) + 1))
    official = {name: tensor.detach().cpu().to(dtype or tensor.dtype).clone() for name, tensor in official.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        torch.save(official, unfinished / "best_model.pt")
        for name, content, indent in (("args.json", args, 2), ("vocab.json", vocab, 0)):
            text = json.dumps(dict(content), indent=indent, ensure_ascii=False)
            (unfinished / name).write_text(f"{text}\n", encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _official_template(config: ScGPTConfig, spelling: str) -> dict[str, Tensor]:
    """Tensors with the names and shapes of an official encoder, whose content means nothing."""
    with torch.device("meta"):
        own = ScGPTEncoder(config).state_dict()
    # almost without memory too, but putting them together does not import torch.compile, which takes seconds
    return to_official({name: torch.zeros(()).expand(value.shape) for name, value in own.items()}, spelling=spelling)
