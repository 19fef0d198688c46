"""Pretrain the embedded checkpoint ``mini``.

    python scripts/pretrain_mini.py --data FOLDER --out FOLDER [--config scripts/pretrain_mini.yaml]

``--data`` is a folder of ``.h5ad`` files with counts in X and gene symbols as variable names; docs/checkpoints.md
lists the data sets that were used. Writes to ``--out``: ``state.pt`` (run again to resume), ``curve.csv`` and
``checkpoint/`` in the official layout, which ``benchmarks/bench_mini.py`` evaluates.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import torch
import yaml
from pretraining.config import PretrainingConfig
from pretraining.corpus import read_corpus
from pretraining.training import export, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of .h5ad files")
    parser.add_argument("--out", required=True, type=Path, help="folder of the run")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="replace settings of the config")
    parser.add_argument("--leave-out", nargs="*", default=[], help="data sets to hold back, for evaluation on them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)

    changes = {name: yaml.safe_load(value) for name, value in (item.split("=", 1) for item in options.set)}
    config = PretrainingConfig.read(options.config, **changes)
    corpus = read_corpus(options.data, min_cells=config.min_cells, exclude=options.leave_out)
    logging.info("%d cells of %d data sets, %d tokens.", corpus.counts.shape[0], len(corpus.names), len(corpus.vocab))
    objective = pretrain(corpus, config, options.out, device=options.device)
    target = options.out / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)
    export(objective, corpus, config, target)
    logging.info("Wrote %s (%.2f MB).", target, sum(file.stat().st_size for file in target.iterdir()) / 1e6)


if __name__ == "__main__":
    main()
