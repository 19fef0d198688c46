"""Shuffled training batches from cells on disk: annbatch, which loads matrices, against tokens that were written once.

    pip install "annbatch[zarrs]"       # Python 3.12 or newer
    python benchmarks/bench_loading.py [--cells 100000] [--genes 4000] [--json loading.json]

Synthetic cells of about 1,000 expressed genes in a zarr store (CSR). annbatch writes a shuffled collection of it and loads
batches of 64 cells with its default settings, which are tokenized and padded as they come. Ours makes the tokens of all
cells once, in files without a name as ``sk.tl.adapt_annotation`` does, and reads 64 random cells at a time. Both make what
each epoch of training needs: padded ids, values and mask. Epochs are interleaved in one process, ours a second time against
itself (null control); CPU time with one thread and wall time. ``--cold`` asks the system to forget what it has cached of
all files before each epoch. Memory is the peak of an epoch above the start; what the system caches of files is not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import anndata as ad
import bench_adapt_stream as synthetic
import numpy as np
import zarr
from _report import add_json_option, write_report

from scdlkit.foundation._memory import PeakMemory
from scdlkit.foundation.batching import Batch, collate
from scdlkit.foundation.matrices import iterate_rows, to_csr
from scdlkit.foundation.stored_tokens import StoredTokens, store_tokens
from scdlkit.foundation.tokens import tokenize, tokenize_pieces

BATCH, PIECE = 64, 1024
_NULL = " again (null)"


def shuffled_collection(store: Path, path: Path):
    """What annbatch loads from: the same cells in random order, in chunks of its own."""
    from annbatch import DatasetCollection

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})  # as annbatch asks for
    return DatasetCollection(str(path)).add_adatas([str(store)], shuffle=True, rng=np.random.default_rng(0))


def annbatch_matrices(collection) -> Iterator:
    """An epoch of batches, CSR."""
    from annbatch import Loader

    loader = Loader(batch_size=BATCH, shuffle=True, preload_to_gpu=False, drop_last=False, rng=np.random.default_rng(0))
    for batch in loader.use_collection(collection):
        yield batch["X"]


def padded(tokens, n_genes: int) -> Batch:
    return collate(tokens, cls_id=n_genes, pad_id=n_genes + 1, pad_value=-2)


def annbatch_tokens(collection, n_genes: int) -> Iterator[Batch]:
    ids = np.arange(n_genes)
    for matrix in annbatch_matrices(collection):
        yield padded(tokenize(to_csr(matrix), ids), n_genes)


def stored(store: Path, n_genes: int, folder: Path) -> StoredTokens:
    matrix = ad.io.sparse_dataset(zarr.open_group(str(store), mode="r")["X"])
    pieces = (rows for _, rows in iterate_rows(matrix, PIECE))
    return store_tokens(tokenize_pieces(pieces, np.arange(n_genes)), folder)[0]


def our_tokens(tokens: StoredTokens, n_genes: int) -> Iterator[Batch]:
    order = np.random.default_rng(0).permutation(tokens.n_cells)
    for start in range(0, len(order), BATCH):
        yield padded(tokens[order[start : start + BATCH]].load(), n_genes)


def count(batches: Iterator) -> tuple[int, int]:
    """Cells, and genes of all of them."""
    cells = genes = 0
    for batch in batches:
        if isinstance(batch, Batch):
            n, width = batch.gene_ids.shape
            shown = width * n if batch.padding_mask is None else int((~batch.padding_mask).sum())
            cells, genes = cells + n, genes + shown - n
        else:
            cells, genes = cells + batch.shape[0], genes + batch.nnz
    return cells, genes


def seconds_of(run: Callable[[], object]) -> tuple[float, float]:
    """CPU time and wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def forget(folder: Path, tokens: StoredTokens) -> None:
    """Have the system drop what it has cached of all files."""
    os.sync()
    files = [file.file.fileno() for file in tokens._place.files.values()]
    for number in files:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=synthetic.N_GENES, help="columns of the matrix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="files are not in the system's cache when an epoch begins")
    add_json_option(parser)
    arguments = parser.parse_args()
    if importlib.util.find_spec("annbatch") is None:
        parser.exit(1, "bench_loading.py measures annbatch, which is not installed here.\n")
    synthetic.N_GENES = n_genes = arguments.genes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = folder / "cells.zarr"
        synthetic.write_cells(store, arguments.cells)
        synthetic.write_cells(folder / "few.zarr", 300)
        list(our_tokens(stored(folder / "few.zarr", n_genes, folder), n_genes))  # compiles
        list(annbatch_tokens(shuffled_collection(folder / "few.zarr", folder / "few"), n_genes))
        made: list = []
        rows = [{"what": "annbatch, shuffled collection", "prepared": True}, {"what": "ours, tokens", "prepared": True}]
        with PeakMemory() as memory:
            times = seconds_of(lambda: made.append(shuffled_collection(store, folder / "collection")))
        rows[0] |= {"cpu_seconds": times[0], "wall_seconds": times[1], "peak_mb": memory.mb}
        rows[0]["disk_mb"] = sum(file.stat().st_size for file in (folder / "collection").rglob("*")) / 1e6
        with PeakMemory() as memory:
            times = seconds_of(lambda: made.append(stored(store, n_genes, folder)))
        rows[1] |= {"cpu_seconds": times[0], "wall_seconds": times[1], "peak_mb": memory.mb}
        collection, tokens = made
        rows[1]["disk_mb"] = tokens._place.n_bytes / 1e6
        cases = {
            "annbatch, matrices alone": lambda: count(annbatch_matrices(collection)),
            "annbatch, tokens": lambda: count(annbatch_tokens(collection, n_genes)),
            "ours, tokens": lambda: count(our_tokens(tokens, n_genes)),
            "ours, tokens" + _NULL: lambda: count(our_tokens(tokens, n_genes)),
        }
        found = {name: run() for name, run in cases.items()}
        if len(set(found.values())) > 1:
            raise SystemExit(f"The loaders give different cells: {found}")
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        peaks: dict[str, float] = {}
        for _ in range(arguments.repeats):
            for name, run in cases.items():
                if arguments.cold:
                    forget(folder, tokens)
                with PeakMemory() as memory:
                    taken[name].append(seconds_of(run))
                peaks[name] = max(peaks.get(name, 0.0), memory.mb)
        ours = np.array(taken["ours, tokens"])
        for name, times in taken.items():
            cpu, wall = (np.array(times) / ours).T
            rows.append(
                {
                    "what": name,
                    "prepared": False,
                    "cells_per_cpu_second": arguments.cells / float(np.median(times, axis=0)[0]),
                    "cells_per_second": arguments.cells / float(np.median(times, axis=0)[1]),
                    "cpu_ratio": float(np.median(cpu)),
                    "cpu_ratio_range": [float(cpu.min()), float(cpu.max())],
                    "wall_ratio": float(np.median(wall)),
                    "wall_ratio_range": [float(wall.min()), float(wall.max())],
                    "peak_mb": peaks[name],
                }
            )
    for row in rows:
        if row["prepared"]:
            print(
                "once: {what:30} {cpu_seconds:6.1f} CPU s, {wall_seconds:6.1f} s, {peak_mb:5.0f} MB of memory, "
                "{disk_mb:.0f} MB on disk".format(**row)
            )
        else:
            print(
                "epoch: {what:29} {cells_per_cpu_second:8.0f} cells a CPU s, {cells_per_second:8.0f} a second; takes "
                "{cpu_ratio:.2f} [{cpu_ratio_range[0]:.2f} - {cpu_ratio_range[1]:.2f}] times ours of the CPU, {wall_ratio:.2f} "
                "[{wall_ratio_range[0]:.2f} - {wall_ratio_range[1]:.2f}] of the clock; {peak_mb:.0f} MB".format(**row)
            )
    settings = {"cells": arguments.cells, "genes": n_genes, "cold": arguments.cold, "repeats": arguments.repeats}
    write_report(arguments.json, __file__, [{**settings, **row} for row in rows])


if __name__ == "__main__":
    main()
