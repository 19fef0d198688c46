"""The pretraining loop: resumes exactly, logs curves, writes the official layout."""

from __future__ import annotations

import csv
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.weights import save_checkpoint

from .batches import BatchSource
from .config import PretrainingConfig
from .corpus import Corpus, gene_vectors
from .objective import Objective

logger = logging.getLogger("pretraining")


def build(corpus: Corpus, config: PretrainingConfig) -> Objective:
    """A fresh encoder with its decoders; the same for the same corpus and config."""
    shape = encoder_config(config, len(corpus.vocab))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = ScGPTEncoder(shape)
        if config.gene_init == "ppmi":
            vectors = gene_vectors(corpus, config.embsize, scale=config.gene_init_scale, seed=config.seed)
            encoder.gene_embedding.weight.data.copy_(torch.from_numpy(vectors))
        return Objective(
            encoder, config.loss_weights, temperature=config.contrast_temperature, bfloat16=config.bfloat16
        )


def encoder_config(config: PretrainingConfig, n_tokens: int) -> ScGPTConfig:
    """Shape of the encoder."""
    return ScGPTConfig.from_args(official_args(config), n_tokens)


def official_args(config: PretrainingConfig) -> dict[str, Any]:
    """Content of ``args.json``: the keys that readers of official checkpoints look for, and the recipe."""
    return {
        "input_style": "binned",
        "input_emb_style": "continuous",
        "pad_token": "<pad>",
        "pad_value": -2,
        "mask_value": -1,
        "n_bins": config.n_bins,
        "max_seq_len": config.max_seq_len,
        "mask_ratio": list(config.mask_ratios),
        "embsize": config.embsize,
        "nheads": config.nheads,
        "d_hid": config.d_hid,
        "nlayers": config.nlayers,
        "n_layers_cls": 3,
        "dropout": config.dropout,
        "MVC": True,
        "no_cls": True,
        "USE_CLS": False,
        "recipe": config.to_dict(),
    }


def pretrain(
    corpus: Corpus,
    config: PretrainingConfig,
    folder: str | Path,
    *,
    device: str = "cpu",
    log_every: int = 20,
    save_every: float = 120.0,
) -> Objective:
    """Train, or go on where ``folder`` stopped.

    Parameters
    ----------
    corpus, config
        Cells and recipe.
    folder
        Takes ``state.pt`` (to resume from; replaced atomically) and ``curve.csv`` (mean losses since the row before).
    device
        Where to train.
    log_every
        Steps per row of the curve.
    save_every
        Seconds between two states.

    Raises
    ------
    ValueError
        If ``folder`` holds a run with another recipe or other data.
    FloatingPointError
        If the loss is no longer finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    objective = build(corpus, config).to(device).train()
    optimizer = torch.optim.AdamW(_parameter_groups(objective, config), betas=(0.9, 0.98), fused=True)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    source = BatchSource(corpus, config, objective.encoder.config)
    identity = {"config": config.to_dict(), "sources": list(corpus.names), "tokens": len(corpus.vocab)}
    state_path, curve_path = folder / "state.pt", folder / "curve.csv"
    first, seconds, curve = 0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["identity"] != identity:
            raise ValueError(f"folder {folder} holds a run with another recipe or other data; choose a new one.")
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
        logger.info("Resuming at step %d of %d.", first, config.steps)

    def save(step: int) -> None:
        state = {
            "identity": identity,
            "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds + time.perf_counter() - start,
            "curve": curve,
        }
        torch.save(state, state_path.with_suffix(".tmp"))
        os.replace(state_path.with_suffix(".tmp"), state_path)
        with curve_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(curve[0]) if curve else ["step"])
            writer.writeheader()
            writer.writerows(curve)

    start = saved = time.perf_counter()
    sums: dict[str, float] = {}
    for step in range(first, config.steps):
        factor = schedule(step, config)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        objective.encoder.requires_grad_(step >= config.head_steps)
        loss, parts = objective(source.draw(step).to(torch.device(device)))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"The loss is {loss.item()} at step {step}; lower learning_rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.gradient_clip)
        optimizer.step()
        for name, value in {"loss": loss, **parts}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        done = step + 1
        if done % log_every == 0 or done == config.steps:
            count = log_every if done % log_every == 0 else done % log_every
            row = {"step": done, "seconds": round(seconds + time.perf_counter() - start, 1)}
            row |= {name: round(total / count, 6) for name, total in sums.items()}
            curve.append(row)
            sums = {}
            logger.info("%s", row)
            # only here, so that a resumed run continues with complete rows of the curve
            if time.perf_counter() - saved > save_every or done == config.steps:
                save(done)
                saved = time.perf_counter()
    return objective.eval()


def export(objective: Objective, corpus: Corpus, config: PretrainingConfig, folder: str | Path) -> Path:
    """Write the official three-file checkpoint with float16 weights."""
    return save_checkpoint(
        folder,
        objective.encoder.state_dict(),
        args=official_args(config),
        vocab=corpus.vocab,
        heads=objective.official_heads(),
        dtype=torch.float16,
    )


def schedule(step: int, config: PretrainingConfig) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _parameter_groups(objective: Objective, config: PretrainingConfig) -> list[dict[str, Any]]:
    """Gene embeddings learn slowly: few cells hold a gene, and their start is good; decoders start from nothing."""
    encoder = objective.encoder
    genes = encoder.gene_embedding.weight
    heads = [*objective.decoder.parameters(), *objective.mvc_decoder.parameters()]
    blocks = [parameter for parameter in encoder.parameters() if parameter is not genes]
    decay = config.weight_decay
    return [
        {"params": [p for p in blocks if p.ndim > 1], "lr": config.learning_rate, "weight_decay": decay},
        {"params": [p for p in blocks if p.ndim == 1], "lr": config.learning_rate, "weight_decay": 0.0},
        {"params": heads, "lr": config.head_learning_rate, "weight_decay": 0.0},
        {"params": [genes], "lr": config.embedding_learning_rate, "weight_decay": 0.0},
    ]
