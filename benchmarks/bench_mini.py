"""Is the embedded checkpoint worth its place? Few labels and none, against random weights, components and genes.

    pip install scib-metrics
    python benchmarks/bench_mini.py cells.h5ad [more.h5ad] --checkpoint 'runs/without-{data}/checkpoint' --seeds 5

``{data}`` stands for the name of the file, so that every data set is read by an encoder that has not seen it. Each seed
draws its own split by class, 60 % training, 10 % validation and 30 % test cells, the same for all methods. ``1 %`` of the
labels means that share of each class among training and validation cells, at least one cell in either. Classes of fewer
than three cells are dropped. Prints mean and standard deviation over the seeds.

- macro-F1 on the test cells: ``frozen_probe`` on the checkpoint and on the same encoder with random weights (others for
  each seed), ``pca_logreg`` as the package fits it, and logistic regression on all log-normalised genes. They share the
  solver, and the validation cells choose the penalty.
- without training: accuracy of 15 nearest training cells (cosine) on the test cells, and the label silhouette of the
  test cells (scib-metrics, 0 to 1), of the embeddings and of 50 principal components of the data set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
import torch
from _report import add_json_option, write_report
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

from scdlkit.foundation.checkpoints import ensure_checkpoint
from scdlkit.foundation.inference import embed_tokens, normalise
from scdlkit.foundation.model import ScGPTEncoder
from scdlkit.foundation.splits import make_split
from scdlkit.foundation.strategies._cells import CellData
from scdlkit.foundation.strategies._logistic import LogisticConfig, fit_logistic
from scdlkit.foundation.strategies.frozen_probe import FrozenProbe, FrozenProbeConfig
from scdlkit.foundation.strategies.pca_logreg import PCALogReg, PCALogRegConfig
from scdlkit.foundation.tokens import TokenizerConfig, tokenize
from scdlkit.foundation.vocabulary import Vocabulary
from scdlkit.foundation.weights import load_encoder

SHARES = (0.01, 0.05, 0.2, 1.0)
METHODS = ("mini", "random", "pca_logreg", "genes")


def embeddings(cells: ad.AnnData, checkpoint: str, seeds: int) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Embedding of the checkpoint (for all seeds), and one of random weights for each seed."""
    found = ensure_checkpoint(checkpoint)
    vocabulary = Vocabulary.from_json(found.vocab_path)
    match = vocabulary.match({"var_names": cells.var_names})
    tokens = tokenize(cells.X, match.token_ids, TokenizerConfig.from_args(found.args()))
    trained = load_encoder(found)
    for name, seed in [("mini", None), *(("random", seed) for seed in range(seeds))]:
        encoder = trained
        if seed is not None:
            torch.manual_seed(seed)
            encoder = ScGPTEncoder(trained.config)
        yield name, seed, embed_tokens(encoder, tokens, cls_id=vocabulary.cls_id, pad_id=vocabulary.pad_id)


def labelled(part: np.ndarray, codes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of each class, at least one cell."""
    of_class = (rng.permutation(part[codes[part] == code]) for code in np.unique(codes[part]))
    return np.sort(np.concatenate([cells[: max(1, round(share * len(cells)))] for cells in of_class]))


def log_normalised(cells: ad.AnnData) -> ad.AnnData:
    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def components(cells: ad.AnnData) -> np.ndarray:
    """50 principal components of the 2,000 most variable genes of all cells."""
    cells = log_normalised(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=2000)
    sc.pp.pca(cells, n_comps=50)
    return cells.obsm["X_pca"]


def predict_genes(
    genes: sp.csr_matrix, codes: np.ndarray, train: np.ndarray, val: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Logistic regression on all genes.

    Its solution lies in the span of the training cells: coordinates there, from the eigenvectors of their inner
    products, give the same model as tens of thousands of genes.
    """
    values, vectors = np.linalg.eigh((genes[train] @ genes[train].T).toarray().astype(np.float64))
    kept = values > values[-1] * 1e-10
    axes = vectors[:, kept] / np.sqrt(values[kept])
    on_axes = [(genes[part] @ genes[train].T).toarray() @ axes for part in (train, val, test)]
    fit = fit_logistic(
        on_axes[0], codes[train], on_axes[1], codes[val],
        n_classes=codes.max() + 1, config=LogisticConfig(), name="genes",
    )  # fmt: skip
    return (on_axes[2] @ fit.coef.T + fit.intercept).argmax(1)


def evaluate(cells: ad.AnnData, checkpoint: str, label_key: str, seeds: int) -> pd.DataFrame:
    """One row per seed, method, metric and share of the labels."""
    from scib_metrics import silhouette_label  # asked for here, so that --help needs no further package

    sizes = cells.obs[label_key].value_counts()
    cells = cells[cells.obs[label_key].isin(sizes.index[sizes >= 3])].copy()
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    codes, classes = pd.factorize(cells.obs[label_key].astype(str), sort=True)
    read = {(name, seed): array for name, seed, array in embeddings(cells, checkpoint, seeds)}
    genes, pca = log_normalised(cells).X, components(cells)
    rows = []
    for seed in range(seeds):
        split = make_split(codes, cells.obs_names, classes=classes, val_size=0.1, test_size=0.3, seed=seed)
        test = split.test
        data = {
            "mini": CellData(embedding=read["mini", None], codes=codes),
            "random": CellData(embedding=read["random", seed], codes=codes),
            "pca_logreg": CellData(
                expression=cells.X, gene_names=cells.var_names.to_numpy(), kind="counts", codes=codes
            ),
        }
        for share in SHARES:
            rng = np.random.default_rng(seed)  # fewer labels are a part of more labels
            train, val = (labelled(part, codes, share, rng) for part in (split.train, split.val))
            for method in METHODS:
                if method == "genes":
                    predicted = predict_genes(genes, codes, train, val, test)
                else:
                    new = PCALogReg(PCALogRegConfig()) if method == "pca_logreg" else FrozenProbe(FrozenProbeConfig())
                    every = data[method]
                    new.fit(every.subset(train), every.subset(val), n_classes=len(classes), seed=seed)
                    predicted = new.predict_proba(every.subset(test)).argmax(1)
                score = f1_score(codes[test], predicted, average="macro", labels=range(len(classes)), zero_division=0)
                rows.append((seed, method, f"macro-F1 {share:.0%}", score))
        spaces = {name: normalise(data[name].embedding) for name in ("mini", "random")} | {"pca": pca}
        for name, space in spaces.items():
            neighbours = KNeighborsClassifier(15, metric="cosine").fit(space[split.train], codes[split.train])
            rows.append((seed, name, "kNN accuracy", neighbours.score(space[test], codes[test])))
            rows.append((seed, name, "silhouette", float(silhouette_label(space[test], codes[test]))))
    return pd.DataFrame(rows, columns=["seed", "method", "metric", "score"])


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation; ``z``: mini minus random weights in standard errors of the difference of means."""
    table = rows.groupby(["data", "metric", "method"], sort=False)["score"].agg(["mean", "std", "count"])
    text = pd.Series([f"{m:.3f} ± {s:.3f}" for m, s in zip(table["mean"], table["std"], strict=True)], table.index)
    wide = text.unstack("method").reindex(columns=[*METHODS, "pca"]).fillna("")
    mini, random = (table.xs(name, level="method") for name in ("mini", "random"))
    error = np.sqrt(mini["std"] ** 2 / mini["count"] + random["std"] ** 2 / random["count"])
    return wide.assign(z=((mini["mean"] - random["mean"]) / error).round(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = []
    for path in arguments.files:
        checkpoint = arguments.checkpoint.replace("{data}", path.stem)
        rows = evaluate(ad.read_h5ad(path), checkpoint, arguments.label_key, arguments.seeds)
        parts.append(rows.assign(data=path.stem))
        print(f"{path.stem} is done.", file=sys.stderr)
    rows = pd.concat(parts)
    print(summary(rows).to_string())
    write_report(arguments.json, __file__, rows, threads=1)


if __name__ == "__main__":
    main()
