"""The whole of `adapt_annotation` with default strategies against the last public scdlkit, each in its own environment.

    python -m venv other && other/bin/pip install scdlkit==0.1.6
    python benchmarks/bench_public.py --other other/bin/python [--json public.json]

Both adapt (frozen_probe and head) to the 700 blood cells of scanpy's pbmc68k_reduced, on a random checkpoint of 64
dimensions and 4 layers whose vocabulary is the genes of the data (the other's vocabulary loader takes minutes on a whole
one). One thread; runs alternate, each in a fresh process, which adapts twice: what is imported or compiled on demand counts in
the first call. Wall time, and peak memory of the process.
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
from _report import add_json_option, write_report

from scdlkit.foundation import ScGPTConfig, ScGPTEncoder, save_checkpoint

COMMON = """
import json, resource, sys, time
import anndata, torch
adata = anndata.read_h5ad(sys.argv[2])
torch.set_num_threads(1)
import scdlkit
import scipy, sklearn.linear_model
taken = []
for _ in range(2):
    start = time.perf_counter()
    {call}
    taken.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("RESULT", json.dumps({{"first": taken[0], "second": taken[1], "peak_mb": peak, "version": getattr(scdlkit, "__version__", "")}}))
"""
THEIRS = 'scdlkit.adapt_annotation(adata, label_key="bulk_labels", device="cpu")'
OURS = 'scdlkit.adapt_annotation(adata, "bulk_labels", checkpoint=sys.argv[1], device="cpu", progress=False)'


def make_checkpoint(folder: Path) -> Path:
    genes = sc.datasets.pbmc68k_reduced().raw.var_names
    vocab = {name: number for number, name in enumerate(["<pad>", "<cls>", "<eoc>", *genes])}
    args = {"embsize": 64, "nheads": 4, "d_hid": 64, "nlayers": 4, "n_layers_cls": 3, "dropout": 0.2}
    args |= {"pad_token": "<pad>", "n_bins": 51, "max_seq_len": 1200, "pad_value": -2, "mask_value": -1}
    args |= {"input_style": "binned", "input_emb_style": "continuous"}
    torch.manual_seed(0)
    encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=len(vocab)))
    return save_checkpoint(folder, encoder.state_dict(), args=args, vocab=vocab)


def run(python: str, call: str, *, cache: Path, checkpoint: Path) -> dict:
    environment = {**os.environ, "SCDLKIT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if python == sys.executable:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [python, "-c", COMMON.format(call=call), str(checkpoint), str(cache / "cells.h5ad")],
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
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        checkpoint = make_checkpoint(cache / "checkpoint")
        cells = sc.datasets.pbmc68k_reduced().raw.to_adata()
        ad.AnnData(cells.X, cells.obs[["bulk_labels"]].astype(str), cells.var[[]]).write_h5ad(cache / "cells.h5ad")
        shutil.copytree(checkpoint, cache / "foundation" / "scgpt" / "whole-human")
        sides = {"public": (os.path.abspath(arguments.other), THEIRS), "ours": (sys.executable, OURS)}
        runs: dict[str, list[dict]] = {name: [] for name in sides}
        for _ in range(arguments.repeats):
            for name, (python, call) in sides.items():
                runs[name].append(run(python, call, cache=cache, checkpoint=checkpoint))
                print(name, runs[name][-1], flush=True)
    for which in ("first", "second"):
        seconds = {name: np.array([one[which] for one in found]) for name, found in runs.items()}
        ratios = seconds["public"] / seconds["ours"]
        print(f"{which} call: {np.median(ratios):.1f} times as fast [{ratios.min():.1f} - {ratios.max():.1f}]")
    print(
        "peak MB:", {name: round(float(np.median([one["peak_mb"] for one in found]))) for name, found in runs.items()}
    )
    write_report(arguments.json, __file__, runs, threads=1)


if __name__ == "__main__":
    main()
