"""Several processes against one: the same table, in what share of the time.

    python benchmarks/bench_processes.py cells.h5ad --processes 2 --strategies frozen_probe adapter

Each repeat runs the comparison once alone and once under ``torchrun --nproc-per-node N``, in turns, with one thread a
process (``--threads``). Prints the ratio of the times of ``fit_compare`` (without start-up and imports), and the largest
difference of a metric between the two: rounding, and other dropout in training where the checkpoint has any.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from _report import add_json_option, write_report

METRICS = [f"{part}_{metric}" for part in ("val", "test") for metric in ("macro_f1", "accuracy")]


def work(arguments: argparse.Namespace, out: Path) -> None:
    """One process among all: the first writes table and seconds."""
    import scdlkit as sk

    sk.settings.verbosity = "ERROR"
    adata = ad.read_h5ad(arguments.file)
    if arguments.cells:
        adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[: arguments.cells]].copy()
    classes = {name: sk.foundation.get_strategy(name).config_class for name in arguments.strategies}
    configs = {
        name: config.from_dict({"training": {"max_epochs": arguments.epochs}})
        for name, config in classes.items()
        if "training" in config.__dataclass_fields__
    }
    runner = sk.AnnotationRunner(
        arguments.label_key,
        checkpoint=arguments.checkpoint,
        strategies=arguments.strategies,
        strategy_configs=configs,
        small_classes="drop",
        max_length=arguments.max_length,
        progress=False,
    )
    start = time.perf_counter()
    table = runner.fit_compare(adata)
    seconds = time.perf_counter() - start
    if os.environ.get("RANK", "0") == "0":
        rows = table.set_index("strategy")[METRICS].to_dict("index")
        out.write_text(json.dumps({"seconds": seconds, "table": rows}))


def launch(arguments: argparse.Namespace, n_processes: int) -> dict:
    """The comparison in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
        command = [sys.executable, *(torchrun if n_processes > 1 else []), __file__, *sys.argv[1:], "--work", str(out)]
        threads = str(arguments.threads)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["frozen_probe", "adapter"])
    parser.add_argument("--checkpoint", default="mini")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--cells", type=int, help="random cells of the file; all by default")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments, arguments.work)
        return
    rows, largest = [], 0.0
    for repeat in range(arguments.repeats):
        order = (1, arguments.processes) if repeat % 2 == 0 else (arguments.processes, 1)
        found = {n: launch(arguments, n) for n in order}
        alone, together = found[1], found[arguments.processes]
        rows.append({"alone": alone["seconds"], "together": together["seconds"]})
        tables = [pd.DataFrame.from_dict(part["table"], "index") for part in (alone, together)]
        largest = max(largest, float((tables[0] - tables[1].loc[tables[0].index]).abs().max(axis=None)))
        print(f"repeat {repeat}: {together['seconds']:.1f} s by {arguments.processes}, {alone['seconds']:.1f} s by one")
    ratio = float(np.median([row["together"] / row["alone"] for row in rows]))
    print(f"time by {arguments.processes} processes / time by one: {ratio:.2f} (median of {len(rows)})")
    print(f"largest difference of a metric: {largest:.4f}")
    results = {"processes": arguments.processes, "seconds": rows, "ratio": ratio, "largest_difference": largest}
    write_report(arguments.json, __file__, results, threads=arguments.threads)


if __name__ == "__main__":
    main()
