"""Annotating a file in pieces: peak memory and speed against the number of cells.

    python benchmarks/bench_predict_stream.py --cells 10000 100000 1000000 --json stream.json

Synthetic cells of about 50 expressed genes are written to a zarr store (CSR), piece by piece, and annotated by a small
random encoder with a probe on it, ``sk.tl.predict_file`` to a table. Every number of cells has a process of its own;
memory is counted from when the model is loaded, and its growth against the smallest number is printed. Growth does not
depend on the encoder; to see all of a run, pass ``--model`` (a saved one) and cells with its genes, ``--data``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import add_json_option, write_report

N_GENES, EXPRESSED, PIECE = 2000, 50, 20_000
TARGET_MB = 300


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
    write_elem(group, "var", pd.DataFrame(index=genes()))
    for name in ("obsm", "uns", "layers"):
        write_elem(group, name, {})
    for start in range(0, n_cells, PIECE):
        size = min(PIECE, n_cells - start)
        columns = np.sort(rng.integers(0, N_GENES, (size, EXPRESSED)), axis=1).ravel()
        values = rng.geometric(0.3, size * EXPRESSED).astype(np.float32)
        rows = sp.csr_matrix((values, columns, np.arange(0, size * EXPRESSED + 1, EXPRESSED)), shape=(size, N_GENES))
        rows.sum_duplicates()
        if start == 0:
            arrays = {
                "data": np.empty(0, np.float32),
                "indices": np.empty(0, np.int32),
                "indptr": np.zeros(1, np.int64),
            }
            matrix = group.create_group("X")
            matrix.attrs.update(
                {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, N_GENES]}
            )
            for name, empty in arrays.items():
                array = matrix.create_array(name, shape=empty.shape, dtype=empty.dtype, chunks=(200_000,))
                array[:] = empty
        at = int(matrix["data"].shape[0])
        matrix["data"].append(rows.data)
        matrix["indices"].append(rows.indices.astype(np.int32))
        matrix["indptr"].append(rows.indptr[1:].astype(np.int64) + at)
    write_elem(group, "obs", pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]))


def write_model(folder: Path) -> Path:
    """A probe on a small encoder with random weights."""
    import anndata as ad
    import pandas as pd
    import torch

    import scdlkit as sk
    from scdlkit.foundation import save_checkpoint
    from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder

    vocab = {name: i for i, name in enumerate([*genes(), "<pad>", "<cls>", "<eoc>"])}
    args = {"embsize": 32, "nheads": 2, "d_hid": 32, "nlayers": 2, "n_layers_cls": 3, "n_bins": 51, "max_seq_len": 1200}
    args |= {
        "pad_token": "<pad>",
        "pad_value": -2,
        "dropout": 0.2,
        "input_style": "binned",
        "input_emb_style": "continuous",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=len(vocab)))
    checkpoint = save_checkpoint(folder / "checkpoint", encoder.state_dict(), args=args, vocab=vocab)
    names = [f"labelled{i}" for i in range(200)]
    counts = np.random.default_rng(1).poisson(0.1, (200, N_GENES)).astype(np.float32)
    cells = ad.AnnData(
        counts,
        obs=pd.DataFrame({"cell_type": ["B", "NK", "T", "mono"] * 50}, index=names),
        var=pd.DataFrame(index=genes()),
    )
    sk.settings.verbosity = "ERROR"
    runner = sk.AnnotationRunner("cell_type", checkpoint=checkpoint, strategies=("frozen_probe",), progress=False)
    runner.fit_compare(cells)
    return runner.save(folder / "model")


def measure(cells: Path, model: Path, out: Path, arrays: bool) -> dict[str, float]:
    """Peak memory above the start and speed of one run, in this process."""
    import psutil

    import scdlkit as sk
    from scdlkit.foundation._memory import PeakMemory

    sk.settings.verbosity, sk.settings.progress = "ERROR", False
    runner = sk.AnnotationRunner.load(model)
    start = psutil.Process().memory_info().rss / 2**20
    began = time.perf_counter()
    with PeakMemory() as memory:
        n_cells = int(sk.tl.predict_file(cells, runner, out, arrays=arrays).sum())
    seconds = time.perf_counter() - began
    return {
        "cells": n_cells,
        "start_mb": start,
        "peak_above_start_mb": memory.mb,
        "seconds": seconds,
        "cells_per_second": n_cells / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", type=Path, help="a saved model; a small random one by default")
    parser.add_argument("--data", type=Path, nargs="*", help="files instead of synthetic cells")
    parser.add_argument("--out", default="csv", choices=["csv", "parquet", "zarr"])
    parser.add_argument("--arrays", action="store_true", help="write embedding and probabilities too")
    add_json_option(parser)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        cells, model, out = map(Path, arguments.one)
        print(json.dumps(measure(cells, model, out, arguments.arrays)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = arguments.model or write_model(folder)
        for number, given in enumerate(arguments.data or sorted(arguments.cells)):
            path = given
            if not arguments.data:
                path = folder / f"{given}.zarr"
                write_cells(path, given)
            command = [sys.executable, __file__, "--one", path, model, folder / f"{number}.{arguments.out}"]
            command += ["--arrays"] if arguments.arrays else []
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            row["growth_mb"] = row["peak_above_start_mb"] - (rows[0] if rows else row)["peak_above_start_mb"]
            rows.append(row)
            print(
                f"{row['cells']:>10,} cells: peak {row['peak_above_start_mb']:6.0f} MB above the {row['start_mb']:.0f} MB "
                f"at the start, growth {row['growth_mb']:+6.0f} MB (target below {TARGET_MB}), "
                f"{row['cells_per_second']:,.0f} cells/s",
                flush=True,
            )
    write_report(arguments.json, __file__, rows)


if __name__ == "__main__":
    main()
