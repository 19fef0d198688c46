"""Is the cell embedding worth anything? Logistic regression on the frozen ``<cls>`` output, against a random encoder."""

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


def macro_f1(embedding: np.ndarray, codes: np.ndarray, *, seed: int, train_share: float = 0.7) -> tuple[float, float]:
    """Macro-F1 of logistic regression, accuracy of 15 nearest neighbours, on held-out cells of a stratified split."""
    train, test = train_test_split(np.arange(len(codes)), train_size=train_share, stratify=codes, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    predicted = probe.fit(embedding[train], codes[train]).predict(embedding[test])
    neighbours = KNeighborsClassifier(15, metric="cosine").fit(embedding[train], codes[train])
    return f1_score(codes[test], predicted, average="macro"), neighbours.score(embedding[test], codes[test])


def evaluate(
    encoders: dict[str, ScGPTEncoder],
    folder: str | Path,
    vocab: dict[str, int],
    *,
    seeds: int = 3,
    max_cells: int = 3000,
    max_length: int | None = None,
) -> pd.DataFrame:
    """Score encoders on every labelled data set (``.obs["cell_type"]``) of a folder; classes of fewer than 8 cells left out.

    Returns
    -------
    DataFrame
        One row per data set and encoder: mean and standard deviation of macro-F1 and kNN accuracy over ``seeds`` splits.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.h5ad")):
        adata = ad.read_h5ad(path)
        if "cell_type" not in adata.obs:
            continue
        counts_per_class = adata.obs["cell_type"].value_counts()
        keep = np.flatnonzero(adata.obs["cell_type"].isin(counts_per_class.index[counts_per_class >= 8]))
        if len(keep) > max_cells:
            keep = np.sort(np.random.default_rng(0).choice(keep, max_cells, replace=False))
        counts = sp.csr_matrix(adata.X, dtype=np.float32)[keep]
        codes = pd.factorize(adata.obs["cell_type"].astype(str).iloc[keep], sort=True)[0]
        token_ids = np.array([vocab.get(name, -1) for name in adata.var_names])
        for name, encoder in encoders.items():
            start = time.perf_counter()
            embedding = embed(encoder, counts, token_ids, vocab, max_length=max_length)
            seconds = time.perf_counter() - start
            scores = np.array([macro_f1(embedding, codes, seed=seed) for seed in range(seeds)])
            rows.append(
                {
                    "data": path.stem,
                    "encoder": name,
                    "macro_f1": scores[:, 0].mean(),
                    "macro_f1_sd": scores[:, 0].std(ddof=1),
                    "knn_accuracy": scores[:, 1].mean(),
                    "knn_accuracy_sd": scores[:, 1].std(ddof=1),
                    "embed_seconds": seconds,
                }
            )
    return pd.DataFrame(rows)
