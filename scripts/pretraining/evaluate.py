"""Is the cell embedding worth anything? Frozen ``<cls>`` outputs against those of other encoders."""

from __future__ import annotations

import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scdlkit.foundation.batching import collate, length_batches
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.tokens import TokenizerConfig, tokenize


def random_encoder(config: ScGPTConfig, *, seed: int) -> ScGPTEncoder:
    """An encoder of the same shape with PyTorch's default initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ScGPTEncoder(config).eval()


def embed(
    encoder: ScGPTEncoder,
    counts: sp.csr_matrix,
    token_ids: np.ndarray,
    vocab: dict[str, int],
    *,
    max_length: int | None = None,
    max_tokens: int = 8192,
) -> np.ndarray:
    """float32 ``[cells, embsize]``: the output at ``<cls>`` for all genes of each cell."""
    config = encoder.config
    tokens = tokenize(counts, token_ids, TokenizerConfig(config.n_bins, max_length or config.max_length))
    device = encoder.gene_embedding.weight.device
    embedding = np.zeros((tokens.n_cells, config.embsize), np.float32)
    encoder.eval()
    with torch.inference_mode():
        tables = encoder.input_tables()
        for rows in length_batches(tokens.lengths, max_tokens=max_tokens):
            batch = collate(tokens[rows], cls_id=vocab["<cls>"], pad_id=vocab["<pad>"], pad_value=config.pad_value).to(
                device
            )
            embedding[rows] = encoder.cls(*batch, tables=tables).float().cpu().numpy()
    return embedding


def scores(embedding: np.ndarray, codes: np.ndarray, *, seed: int) -> dict[str, float]:
    """Logistic regression (macro-F1; all or 5 % of the training labels) and 15 nearest neighbours (accuracy) on held-out cells.

    70 % of the cells train, stratified by class; 5 % of them means at least one cell a class.
    """
    train, test = train_test_split(np.arange(len(codes)), train_size=0.7, stratify=codes, random_state=seed)
    rng = np.random.default_rng(seed)
    of_class = [rng.permutation(train[codes[train] == code]) for code in np.unique(codes)]
    few = np.concatenate([cells[: max(1, round(0.05 * len(cells)))] for cells in of_class])
    result = {}
    for name, labelled in (("macro_f1", train), ("macro_f1_5pct", few)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        predicted = probe.fit(embedding[labelled], codes[labelled]).predict(embedding[test])
        result[name] = f1_score(codes[test], predicted, average="macro")
    neighbours = KNeighborsClassifier(15, metric="cosine").fit(embedding[train], codes[train])
    return result | {"knn_accuracy": neighbours.score(embedding[test], codes[test])}


def evaluate(
    encoders: dict[str, ScGPTEncoder], folder: str | Path, vocab: dict[str, int], *, seeds: int = 3
) -> pd.DataFrame:
    """Score encoders on every data set of a folder with labels (``.obs["cell_type"]``); classes below 8 cells left out.

    Returns
    -------
    DataFrame
        One row per data set and encoder: mean and standard deviation of :func:`scores` over ``seeds`` splits, and the
        seconds that the embedding took.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.h5ad")):
        adata = ad.read_h5ad(path)
        if "cell_type" not in adata.obs:
            continue
        sizes = adata.obs["cell_type"].value_counts()
        adata = adata[adata.obs["cell_type"].isin(sizes.index[sizes >= 8])]
        codes = pd.factorize(adata.obs["cell_type"].astype(str), sort=True)[0]
        token_ids = np.array([vocab.get(name, -1) for name in adata.var_names])
        for name, encoder in encoders.items():
            start = time.perf_counter()
            embedding = embed(encoder, sp.csr_matrix(adata.X, dtype=np.float32), token_ids, vocab)
            seconds = time.perf_counter() - start
            table = pd.DataFrame([scores(embedding, codes, seed=seed) for seed in range(seeds)])
            spread = table.std().add_suffix("_sd")
            rows.append(
                {"data": path.stem, "encoder": name, **table.mean(), **spread, "cells": len(codes), "seconds": seconds}
            )
    return pd.DataFrame(rows)
