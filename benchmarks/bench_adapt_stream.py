"""Adapting to cells on disk: peak memory, speed and disk against the number of cells.

    python benchmarks/bench_adapt_stream.py --cells 5000 20000 100000 --json adapt.json

Synthetic cells of about 1,000 expressed genes and four classes are written to a zarr store (CSR), piece by piece, and given
to ``sk.tl.adapt_annotation`` with a small random encoder: strategies on the frozen embedding, the baseline on the genes, and
one epoch inside the encoder. Every combination has a process of its own. Memory is counted from after a run on 300 cells;
``--memory`` reads all cells before that, for comparison. What grows with the cells is the embedding (which is small here:
multiply by the width of yours), the variable genes of the baseline, and some numbers a cell.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import add_json_option, write_report

N_GENES, DRAWN, OWN, PIECE = 4000, 1150, 100, 2000
CLASSES = ("B", "NK", "T", "mono")
RUNS = {
    "frozen_probe + head": {"strategies": ("frozen_probe", "head"), "baselines": ()},
    "frozen_probe + pca_logreg": {"strategies": ("frozen_probe",), "baselines": ("pca_logreg",)},
    "lora, 1 epoch": {"strategies": ("lora",), "baselines": ()},
}


def genes() -> list[str]:
    return [f"GENE{i}" for i in range(N_GENES)]


def write_cells(path: Path, n_cells: int, seed: int = 0) -> None:
    """Counts of ``n_cells`` cells as an AnnData on zarr; never more than a piece of them in memory."""
    import pandas as pd
    import scipy.sparse as sp
    import zarr
    from anndata.io import write_elem

    rng = np.random.default_rng(seed)
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    matrix = group.create_group("X")
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]})
    for name, dtype, size in (("data", np.float32, 0), ("indices", np.int32, 0), ("indptr", np.int64, 1)):
        matrix.create_array(name, shape=(size,), dtype=dtype, chunks=(500_000,))[:] = 0
    codes = rng.integers(0, len(CLASSES), n_cells)
    for start in range(0, n_cells, PIECE):
        of_piece = codes[start : start + PIECE]
        columns = rng.integers(0, N_GENES, (len(of_piece), DRAWN))
        columns[:, :OWN] = of_piece[:, None] * 2 * OWN + rng.integers(0, 2 * OWN, (len(of_piece), OWN))
        ends = np.arange(0, columns.size + 1, DRAWN)
        values = rng.geometric(0.3, columns.size).astype(np.float32)
        rows = sp.csr_matrix((values, columns.ravel(), ends), shape=(len(of_piece), N_GENES))
        rows.sum_duplicates()
        at = int(matrix["data"].shape[0])
        matrix["data"].append(rows.data)
        matrix["indices"].append(rows.indices.astype(np.int32))
        matrix["indptr"].append(rows.indptr[1:].astype(np.int64) + at)
    obs = pd.DataFrame({"cell_type": pd.Categorical.from_codes(codes, CLASSES)}, [f"cell{i}" for i in range(n_cells)])
    write_elem(group, "obs", obs)
    write_elem(group, "var", pd.DataFrame(index=genes()))


def write_checkpoint(folder: Path) -> Path:
    """A small encoder with random weights: memory does not depend on what it has learnt."""
    import torch

    from scdlkit.foundation import save_checkpoint
    from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder

    vocab = {name: i for i, name in enumerate([*genes(), "<pad>", "<cls>", "<eoc>"])}
    args = {"embsize": 16, "nheads": 1, "d_hid": 16, "nlayers": 1, "n_layers_cls": 3, "n_bins": 51, "max_seq_len": 1200}
    args |= {"pad_token": "<pad>", "pad_value": -2, "dropout": 0.2}
    args |= {"input_style": "binned", "input_emb_style": "continuous"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=len(vocab)))
    return save_checkpoint(folder / "checkpoint", encoder.state_dict(), args=args, vocab=vocab)


def measure(path: Path, checkpoint: Path, name: str, temporary: Path, *, memory: bool) -> dict[str, Any]:
    """Peak memory above the start, time, and what the log says of the disk, in this process."""
    import anndata as ad
    import psutil
    import zarr

    import scdlkit as sk
    from scdlkit.foundation import LoRAConfig, TrainingConfig
    from scdlkit.foundation._memory import PeakMemory

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("scdlkit").addHandler(handler)
    sk.settings.progress, sk.settings.device, sk.settings.temp_dir = False, "cpu", temporary
    group = zarr.open_group(str(path), mode="r")
    matrix = ad.io.sparse_dataset(group["X"])
    matrix = matrix.to_memory() if memory else matrix
    adata = ad.AnnData(matrix, obs=ad.io.read_elem(group["obs"]), var=ad.io.read_elem(group["var"]))
    options = {"checkpoint": checkpoint, **RUNS[name]}
    if "lora" in name:
        options["lora_config"] = LoRAConfig(training=TrainingConfig(max_epochs=1))
    sk.tl.adapt_annotation(adata[:300].to_memory(), **options)  # loads and compiles what any run needs
    start = psutil.Process().memory_info().rss / 2**20
    began = time.perf_counter()
    with PeakMemory() as used:
        runner = sk.tl.adapt_annotation(adata, **options)
    found = [re.search(r"kept in files in .* \((\d+) MB\)", line) for line in said]
    return {
        "run": name,
        "matrix": "memory" if memory else "zarr",
        "cells": adata.n_obs,
        "start_mb": start,
        "peak_above_start_mb": used.mb,
        "disk_mb": sum(float(match[1]) for match in found if match),
        "seconds": time.perf_counter() - began,
        "test_macro_f1": float(runner.results_["test_macro_f1"].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[5_000, 20_000])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--memory", action="store_true", help="read the cells into memory first")
    add_json_option(parser)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path, checkpoint, name, temporary = arguments.one
        print(json.dumps(measure(Path(path), Path(checkpoint), name, Path(temporary), memory=arguments.memory)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = write_checkpoint(folder)
        for n_cells in sorted(arguments.cells):
            path = folder / f"{n_cells}.zarr"
            write_cells(path, n_cells)
            for name in arguments.runs:
                command = [sys.executable, __file__, "--one", str(path), str(checkpoint), name, str(folder)]
                command += ["--memory"] if arguments.memory else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"{row['cells']:>9,} cells, {name:<25} peak {row['peak_above_start_mb']:6.0f} MB above the "
                    f"{row['start_mb']:.0f} MB at the start, {row['disk_mb']:6.0f} MB on disk, {row['seconds']:5.0f} s",
                    flush=True,
                )
                write_report(arguments.json, __file__, rows)


if __name__ == "__main__":
    main()
