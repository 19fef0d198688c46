"""Embedding on the CPU: scGPT's computation against ours, interleaved, with a null control.

    python benchmarks/bench_embed.py                                   # shape of whole-human, random weights
    python benchmarks/bench_embed.py --threads 2 --json embed.json
    python benchmarks/bench_embed.py --cells cells.h5ad --checkpoint mini --label-key cell_type   # errors and labels

The first form times one batch of cells of about 233 genes and one of 1,199 through both. Upstream's computation is
PyTorch's own ``nn.TransformerEncoder`` in eval mode, with upstream's input layers and padding: that is what scGPT runs
without flash-attention, and it takes PyTorch's fast path for inference on nested tensors. Ours is
``scdlkit.foundation.embed_tokens``, which ``sk.tl.embed`` calls for every piece of the data. CPU time, or wall time with
several threads; median [range] of the ratios of neighbouring runs. "fp32, sk.tl.embed" is all that a user waits for, from
counts in an AnnData to ``.obsm``, the reading of the checkpoint included, with four times as many cells.

The second form embeds real cells in every precision and compares embeddings, and labels of one logistic regression, with
fp32; then the labels that ``sk.tl.predict`` gives to every second cell after a fit on the others.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from _report import add_json_option, write_report
from torch import Tensor, nn

import scdlkit as sk
from scdlkit.foundation import ScGPTConfig, ScGPTEncoder, Tokens, embed_tokens, save_checkpoint
from scdlkit.foundation.batching import collate
from scdlkit.foundation.inference import normalise

CLS, PAD, N_TOKENS = 2, 0, 30_000
PRECISIONS = ("fp32", "bf16", "int8")
TIMES = 4  # as many cells where the checkpoint is read as well


class Upstream(nn.Module):
    """What scGPT computes, with the weights of our encoder."""

    def __init__(self, encoder: ScGPTEncoder) -> None:
        super().__init__()
        config = encoder.config
        self.inputs = encoder.embed_inputs
        layer = nn.TransformerEncoderLayer(
            config.embsize, config.nheads, config.d_hid, config.dropout, batch_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config.nlayers)
        with torch.no_grad():
            for theirs, ours in zip(self.blocks.layers, encoder.blocks, strict=True):
                attention = theirs.self_attn
                attention.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
                attention.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
                pairs = (
                    (attention.out_proj, ours.out),
                    (theirs.linear1, ours.fc1),
                    (theirs.linear2, ours.fc2),
                    (theirs.norm1, ours.norm1),
                    (theirs.norm2, ours.norm2),
                )
                for one, other in pairs:
                    one.load_state_dict(other.state_dict())
        self.eval()

    def forward(self, gene_ids: Tensor, values: Tensor, padding_mask: Tensor) -> Tensor:
        return self.blocks(self.inputs(gene_ids, values), src_key_padding_mask=padding_mask)[:, 0]


def cells_of(lengths: np.ndarray) -> Tokens:
    """Random cells with so many genes."""
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([rng.choice(np.arange(3, N_TOKENS), n, replace=False) for n in lengths])
    bins = rng.integers(1, 51, indptr[-1])
    return Tokens(indptr, ids.astype(np.int32), bins.astype(np.uint8), lengths.astype(np.uint64), lengths)


def by_upstream(upstream: Upstream, tokens: Tokens) -> np.ndarray:
    """One batch, padded to its longest cell."""
    batch = collate(tokens, cls_id=CLS, pad_id=PAD, pad_value=-2)
    mask = torch.zeros(batch.gene_ids.shape, dtype=torch.bool) if batch.padding_mask is None else batch.padding_mask
    with torch.no_grad():
        return upstream(batch.gene_ids, batch.values, mask).numpy()


def timed(run: Callable[[], np.ndarray], clock: Callable[[], float]) -> tuple[float, np.ndarray]:
    start = clock()
    result = run()
    return clock() - start, result


def through_anndata(encoder: ScGPTEncoder, lengths: np.ndarray) -> Callable[[], np.ndarray]:
    """The whole of ``sk.tl.embed`` on counts of cells with so many genes: reading the checkpoint, tokens, embedding."""
    tokens, folder = cells_of(lengths), Path(tempfile.mkdtemp()) / "checkpoint"
    atexit.register(shutil.rmtree, folder.parent)
    genes = [f"GENE{i}" for i in range(3, N_TOKENS - 1)]
    shape = {name: getattr(encoder.config, name) for name in ("embsize", "nheads", "d_hid", "nlayers")}
    vocab = {name: number for number, name in enumerate(["<pad>", "<unk>", "<cls>", *genes, "<eoc>"])}
    save_checkpoint(folder, encoder.state_dict(), args=shape, vocab=vocab)
    counts = sp.csr_matrix((tokens.bins.astype(np.float32), tokens.gene_ids, tokens.indptr), (len(lengths), N_TOKENS))
    counts.sort_indices()
    adata = ad.AnnData(counts[:, 3:-1], var=pd.DataFrame(index=genes))
    return lambda: (
        sk.tl.embed(adata, checkpoint=folder, device="cpu", precision="fp32", progress=False) or adata.obsm["X_scgpt"]
    )


def speed(arguments: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    encoder = ScGPTEncoder(ScGPTConfig(N_TOKENS, 512, 8, 512, 12)).eval()
    upstream = Upstream(encoder).eval()
    rng = np.random.default_rng(0)
    rows = []
    for lengths, repeats in (
        (rng.integers(180, 286, 64), arguments.repeats),
        (np.full(8, 1199), max(3, arguments.repeats // 2)),
    ):
        tokens = cells_of(lengths)
        runs: dict[str, Callable[[], np.ndarray]] = {
            "upstream": lambda tokens=tokens: by_upstream(upstream, tokens),
            "upstream again (null)": lambda tokens=tokens: by_upstream(upstream, tokens),
        }
        for precision in arguments.precisions:
            runs[precision] = lambda tokens=tokens, precision=precision: embed_tokens(
                encoder, tokens, cls_id=CLS, pad_id=PAD, device="cpu", precision=precision, progress=False
            )
        runs["fp32, sk.tl.embed"] = through_anndata(encoder, np.tile(lengths, TIMES))
        expected = normalise(by_upstream(upstream, tokens))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        worst: dict[str, float] = dict.fromkeys(runs, 0.0)
        for run in runs.values():  # compiles, and touches memory for the first time
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                taken, found = timed(run, clock)
                seconds[name].append(taken * len(lengths) / len(found))
                if len(found) != len(lengths):  # of other genes
                    worst[name] = float("nan")
                else:
                    worst[name] = max(worst[name], float(np.abs(normalise(found) - expected).max()))
        for name in runs:
            ratios = np.array(seconds["upstream"]) / np.array(seconds[name])
            rows.append(
                {
                    "tokens": float(lengths.mean() + 1),
                    "what": name,
                    "threads": arguments.threads,
                    "cells_per_second": len(lengths) / float(np.median(seconds[name])),
                    "ratio": float(np.median(ratios)),
                    "lowest": float(ratios.min()),
                    "highest": float(ratios.max()),
                    "repeats": repeats,
                    "largest_error": worst[name],
                }
            )
            print(
                "{tokens:6.0f} tokens  {what:22} {cells_per_second:7.2f} cells/s  {ratio:5.2f} "
                "[{lowest:.2f} - {highest:.2f}]  error {largest_error:.1e}".format(**rows[-1]),
                flush=True,
            )
    return rows


def agreement(arguments: argparse.Namespace) -> list[dict]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    torch.set_num_threads(arguments.threads)
    sk.settings.verbosity = "ERROR"
    rows = []
    for path in arguments.cells:
        adata = ad.read_h5ad(path)
        found, seconds, predicted = {}, {}, predicted_labels(adata, arguments)
        for precision in PRECISIONS:
            start = time.perf_counter()
            sk.tl.embed(adata, checkpoint=arguments.checkpoint, precision=precision, device="cpu", progress=False)
            seconds[precision] = time.perf_counter() - start
            found[precision] = adata.obsm["X_scgpt"]
        labels = adata.obs[arguments.label_key].astype(str).to_numpy()
        train = np.random.default_rng(0).random(adata.n_obs) < 0.7
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(found["fp32"][train], labels[train])
        expected = probe.predict(found["fp32"])
        for precision in PRECISIONS:
            rows.append(
                {
                    "data": path.stem,
                    "what": precision,
                    "largest_error": float(np.abs(found[precision] - found["fp32"]).max()),
                    "least_cosine": float((found[precision] * found["fp32"]).sum(1).min()),
                    "same_label": float((probe.predict(found[precision]) == expected).mean()),
                    "same_predicted": float((predicted[precision] == predicted["fp32"]).mean()),
                    "seconds": seconds[precision],
                    "cells": adata.n_obs,
                }
            )
            print(
                "{data}: {what}  error {largest_error:.1e}  cosine >= {least_cosine:.6f}  same label "
                "{same_label:.2%} of {cells}, by sk.tl.predict {same_predicted:.2%} of the half that taught nothing  "
                "{seconds:.1f} s".format(**rows[-1]),
                flush=True,
            )
    return rows


def predicted_labels(adata: ad.AnnData, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """What ``sk.tl.predict`` calls every second cell, by precision; a logistic regression learnt from the others in fp32."""
    taught, others = adata[::2].copy(), adata[1::2].copy()
    runner = sk.tl.adapt_annotation(
        taught, arguments.label_key, checkpoint=arguments.checkpoint, strategies=("frozen_probe",), baselines=(),
        small_classes="drop", device="cpu", progress=False,
    )  # fmt: skip
    found = {}
    for precision in PRECISIONS:
        sk.tl.predict(others, runner, precision=precision)
        found[precision] = others.obs["scgpt_label"].astype(str).to_numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="to be timed")
    parser.add_argument("--cells", type=Path, nargs="+", help="labelled h5ad files: errors and labels instead of times")
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--label-key", default="cell_type")
    add_json_option(parser)
    arguments = parser.parse_args()
    sk.settings.verbosity = "ERROR"
    rows = agreement(arguments) if arguments.cells else speed(arguments)
    write_report(arguments.json, __file__, rows, threads=arguments.threads)


if __name__ == "__main__":
    main()
