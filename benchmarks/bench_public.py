"""`adapt_annotation` against the last public scdlkit, each in its own environment.

    python -m venv other && other/bin/pip install scdlkit==0.1.6
    python benchmarks/bench_public.py --other other/bin/python [--json public.json]
    python benchmarks/bench_public.py --other other/bin/python --strategy lora
    python benchmarks/bench_public.py --other other/bin/python --strategy full_finetune

Both adapt to the 700 blood cells of scanpy's pbmc68k_reduced by their default strategies (frozen_probe and head), or to
140 of them by one strategy that trains inside the encoder, in two epochs of 64 cells a step as the public one has it; it
has no full_finetune, so there its lora without the adapters trains with all weights thawed. The checkpoint is random, with
64 dimensions and 4 layers, and its vocabulary is the genes of the data (the other's loader takes minutes on a whole one).
One thread; runs alternate, each in a fresh process, which adapts twice: what is imported or loaded on demand counts in the
first call. What both come to import before a user calls them, scanpy and scikit-learn, is imported before the clock
starts, and ours runs once before, since numba keeps what it compiles. Ours fits two baselines as well by default, which
the public one does not have; "the same two" is without them. Wall time, and peak memory of the process beyond what it
had before the call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from _report import add_json_option, installed_environment, write_report

from scdlkit.foundation import ScGPTConfig, ScGPTEncoder, save_checkpoint

COMMON = """
import json, resource, sys, time
import anndata, torch
adata = anndata.read_h5ad(sys.argv[2])
torch.set_num_threads(1)
import scdlkit
import scanpy, scipy, sklearn.linear_model
{before}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
taken, start_mb = [], peak()
for _ in range(2):
    start = time.perf_counter()
    {call}
    taken.append(time.perf_counter() - start)
print("RESULT", json.dumps({{
    "first": taken[0], "second": taken[1], "peak_mb": peak(), "beyond_mb": peak() - start_mb,
}}))
"""
THEIRS = 'scdlkit.adapt_annotation(adata, label_key="bulk_labels", device="cpu"{more})'
OURS = 'scdlkit.adapt_annotation(adata, "bulk_labels", checkpoint=sys.argv[1], device="cpu", progress=False{more})'
TRAINED = """
from scdlkit.foundation import TrainingConfig, get_strategy
config = get_strategy("{name}").config_class
configs = {{"{name}": config(training=TrainingConfig(batch_size=64, max_epochs=2))}}
"""
THAWED = """
from scdlkit.foundation import runner as public
load = public.load_scgpt_annotation_model
def thawed(**options):
    model = load(**{**options, "tuning_strategy": "head"})
    model.tuning_strategy = "all"
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model
public.load_scgpt_annotation_model = thawed
"""


def sides_of(strategy: str | None) -> dict[str, tuple[str, str]]:
    """What runs before the clock and what is timed, of theirs and of ours."""
    if strategy is None:
        like = OURS.format(more=", baselines=()")
        return {"public": ("", THEIRS.format(more="")), "ours": ("", OURS.format(more="")), "the same two": ("", like)}
    theirs = (THAWED if strategy == "full_finetune" else "", THEIRS.format(more=', strategies=("lora",)'))
    chosen = f', strategies=("{strategy}",), baselines=(), strategy_configs=configs'
    return {"public": theirs, "ours": (TRAINED.format(name=strategy), OURS.format(more=chosen))}


def cells_for(strategy: str | None) -> ad.AnnData:
    """All cells; for training inside the encoder 140 of them, and six of a class at least."""
    cells = sc.datasets.pbmc68k_reduced().raw.to_adata()
    if strategy is not None:
        order = np.random.default_rng(0).permutation(cells.n_obs)
        labels = cells.obs["bulk_labels"].astype(str).to_numpy()[order]
        rank = np.zeros(len(order), int)
        for label in np.unique(labels):
            rank[labels == label] = np.arange((labels == label).sum())
        few = np.flatnonzero(rank < 6)
        cells = cells[order[np.union1d(few, np.setdiff1d(np.arange(140), few)[: 140 - len(few)])]]
    return ad.AnnData(cells.X, cells.obs[["bulk_labels"]].astype(str), cells.var[[]])


def make_checkpoint(folder: Path) -> Path:
    genes = sc.datasets.pbmc68k_reduced().raw.var_names
    vocab = {name: number for number, name in enumerate(["<pad>", "<cls>", "<eoc>", *genes])}
    args = {"embsize": 64, "nheads": 4, "d_hid": 64, "nlayers": 4, "n_layers_cls": 3, "dropout": 0.2}
    args |= {"pad_token": "<pad>", "n_bins": 51, "max_seq_len": 1200, "pad_value": -2, "mask_value": -1}
    args |= {"input_style": "binned", "input_emb_style": "continuous"}
    torch.manual_seed(0)
    encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=len(vocab)))
    return save_checkpoint(folder, encoder.state_dict(), args=args, vocab=vocab)


def run(python: str, before: str, call: str, *, cache: Path, checkpoint: Path) -> dict:
    environment = {**installed_environment(), "SCDLKIT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if python == sys.executable:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [python, "-c", COMMON.format(before=before, call=call), str(checkpoint), str(cache / "cells.h5ad")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=cache,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{python} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", required=True, help="Python of an environment with the public scdlkit")
    parser.add_argument("--strategy", choices=("lora", "full_finetune"), help="the defaults without")
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        checkpoint = make_checkpoint(cache / "checkpoint")
        cells_for(arguments.strategy).write_h5ad(cache / "cells.h5ad")
        shutil.copytree(checkpoint, cache / "foundation" / "scgpt" / "whole-human")
        sides = sides_of(arguments.strategy)
        run(sys.executable, *sides["ours"], cache=cache, checkpoint=checkpoint)  # compiles, which is kept
        runs: dict[str, list[dict]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, (before, call) in sides.items():
                python = os.path.abspath(arguments.other) if name == "public" else sys.executable
                runs[name].append(run(python, before, call, cache=cache, checkpoint=checkpoint))
                print(name, runs[name][-1], flush=True)
    for which in ("first", "second"):
        seconds = {name: np.array([one[which] for one in found]) for name, found in runs.items()}
        again = seconds["public"][:-1] / seconds["public"][1:]
        if len(again):
            print(f"{which} call, public against its next run (null): [{again.min():.2f} - {again.max():.2f}]")
        for name in list(sides)[1:]:
            ratios = seconds["public"] / seconds[name]
            print(
                f"{which} call, {name}: {np.median(ratios):.1f} times as fast [{ratios.min():.1f} - {ratios.max():.1f}]"
            )
    for what in ("peak_mb", "beyond_mb"):
        print(f"{what}:", {name: round(float(np.median([one[what] for one in found]))) for name, found in runs.items()})
    write_report(arguments.json, __file__, runs, threads=1)


if __name__ == "__main__":
    main()
