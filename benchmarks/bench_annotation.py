"""Annotation quality: frozen_probe and head on a checkpoint, on the same encoder with random weights, and the baseline.

    python benchmarks/bench_annotation.py cells.h5ad [more.h5ad] --checkpoint mini --seeds 5

Each seed draws its own split, tokens, training order and random weights. Prints mean and standard deviation of the test
macro-F1 over the seeds. Classes too small to be split are dropped. Beware of checkpoints that have seen the cells (without
labels) in pretraining: ``mini`` has seen the data sets its model card lists.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path

import anndata as ad
import pandas as pd
import torch
from _report import add_json_option, write_report

import scdlkit as sk
from scdlkit.foundation import ensure_checkpoint, save_checkpoint
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder


def random_checkpoint(checkpoint: str, folder: Path, seed: int) -> Path:
    """The same architecture and vocabulary with PyTorch's initial weights."""
    found = ensure_checkpoint(checkpoint)
    vocab = json.loads(found.vocab_path.read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ScGPTEncoder(ScGPTConfig.from_args(found.args(), n_tokens=max(vocab.values()) + 1))
    return save_checkpoint(folder / f"random-{seed}", encoder.state_dict(), args=found.args(), vocab=vocab)


def run(adata: ad.AnnData, checkpoint: str | Path, label_key: str, group_key: str | None, seed: int) -> pd.DataFrame:
    runner = sk.AnnotationRunner(
        label_key, checkpoint=checkpoint, group_key=group_key, small_classes="drop", random_state=seed, progress=False
    )
    return runner.fit_compare(adata)[
        ["strategy", "role", "val_macro_f1", "test_macro_f1", "test_accuracy", "fit_seconds"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--group-key")
    parser.add_argument("--seeds", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    sk.settings.verbosity = "ERROR"
    rows = []
    for path in arguments.files:
        adata = ad.read_h5ad(path)
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                random = random_checkpoint(arguments.checkpoint, Path(folder), seed)
                for name, checkpoint in ((arguments.checkpoint, arguments.checkpoint), ("random weights", random)):
                    table = run(adata, checkpoint, arguments.label_key, arguments.group_key, seed)
                    table.loc[table["role"] == "baseline", "encoder"] = "none"
                    table["encoder"] = table.get("encoder", pd.Series(index=table.index, dtype=object)).fillna(name)
                    rows.append(table.assign(data=path.stem, seed=seed))
    results = pd.concat(rows).drop_duplicates(["data", "seed", "strategy", "encoder"])
    summary = results.groupby(["data", "strategy", "encoder"])["test_macro_f1"].agg(["mean", "std", "count"])
    summary["test macro-F1"] = [f"{m:.3f} ± {s:.3f}" for m, s in zip(summary["mean"], summary["std"], strict=True)]
    print(summary[["test macro-F1", "count"]].to_string())
    write_report(arguments.json, __file__, results)


if __name__ == "__main__":
    main()
