"""Tokenization: upstream's data set + collator against ours, on the same cells, one core, interleaved.

    pip install --no-deps scgpt==0.2.4          # its own modules are read, its dependencies are not needed
    python benchmarks/bench_tokenize.py cells.h5ad [more.h5ad]

Without files it runs on the 700 cells of ``scanpy.datasets.pbmc68k_reduced``. Both sides go from the matrix to padded
batches of tensors. Each repeat times both sides, and ours twice: the ratio of the two is the null control.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np
import scipy.sparse as sp
import torch
from _report import add_json_option, write_report

from scdlkit.foundation.batching import collate, length_batches
from scdlkit.foundation.tokens import TokenizerConfig, tokenize

PAD, CLS, PAD_VALUE, MAX_LENGTH, BATCH = 60_694, 60_695, -2, 1200, 64


def upstream_collator():
    """Upstream's DataCollator, read from the installed package without running its ``__init__`` (which needs torchtext)."""
    spec = importlib.util.find_spec("scgpt")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("scgpt is not installed: pip install --no-deps scgpt==0.2.4")
    package = types.ModuleType("scgpt")
    package.__path__ = list(spec.submodule_search_locations)
    package.logger = __import__("logging").getLogger("scgpt")
    sys.modules["scgpt"] = package
    collator_class = importlib.import_module("scgpt.data_collator").DataCollator
    return collator_class(
        do_padding=True, pad_token_id=PAD, pad_value=PAD_VALUE, do_mlm=False, do_binning=True,
        max_length=MAX_LENGTH, sampling=True, keep_first_n_tokens=1,
    )  # fmt: skip


def run_upstream(dense: np.ndarray, gene_ids: np.ndarray, collator) -> Iterator[torch.Tensor]:
    """What upstream does with a dense matrix: one example a cell, then the collator; yields the gene ids of each batch."""
    for start in range(0, len(dense), BATCH):
        examples = []
        for row in dense[start : start + BATCH]:
            expressed = np.nonzero(row)[0]
            examples.append(
                {
                    "id": start,
                    "genes": torch.from_numpy(np.insert(gene_ids[expressed], 0, CLS)).long(),
                    "expressions": torch.from_numpy(np.insert(row[expressed], 0, PAD_VALUE)).float(),
                }
            )
        yield collator(examples)["gene"]


def run_ours(matrix: sp.csr_matrix, gene_ids: np.ndarray) -> Iterator[torch.Tensor]:
    tokens = tokenize(matrix, gene_ids, TokenizerConfig(max_length=MAX_LENGTH))
    for rows in length_batches(tokens.lengths, max_tokens=BATCH * MAX_LENGTH, max_cells=BATCH):
        yield collate(tokens, rows, cls_id=CLS, pad_id=PAD, pad_value=PAD_VALUE).gene_ids


def count_tokens(batches: Iterator[torch.Tensor]) -> int:
    return sum(int((gene_ids != PAD).sum()) for gene_ids in batches)


def timed(run: Callable[..., Iterator[torch.Tensor]], *arguments, times: int = 1) -> float:
    """CPU seconds of one run; short ones are run several times."""
    start = time.process_time()
    for _ in range(times):
        for _ in run(*arguments):
            pass
    return (time.process_time() - start) / times


def read_cells(path: str | None, n_cells: int) -> tuple[str, sp.csr_matrix]:
    if path is None:
        import scanpy as sc

        return "pbmc68k_reduced", sp.csr_matrix(sc.datasets.pbmc68k_reduced().raw.X, dtype=np.float32)
    import anndata as ad

    matrix = sp.csr_matrix(ad.read_h5ad(path).X, dtype=np.float32)
    rows = np.random.default_rng(0).permutation(matrix.shape[0])[:n_cells]
    return Path(path).stem, matrix[rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=[None])
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=7)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    collator, rows = upstream_collator(), []
    for path in arguments.files:
        name, matrix = read_cells(path, arguments.cells)
        gene_ids = np.random.default_rng(0).permutation(PAD)[: matrix.shape[1]].astype(np.int64)
        dense = matrix.toarray()
        n_ours, n_theirs = (  # compiles, too
            count_tokens(run_ours(matrix, gene_ids)), count_tokens(run_upstream(dense, gene_ids, collator))
        )  # fmt: skip
        if n_theirs != n_ours:
            raise SystemExit(f"The two sides made {n_theirs} and {n_ours} tokens.")
        times: dict[str, list[float]] = {"upstream": [], "ours": [], "again": []}
        for _ in range(arguments.repeats):
            theirs = timed(run_upstream, dense, gene_ids, collator)
            ours = timed(run_ours, matrix, gene_ids, times=5)
            again = timed(run_ours, matrix, gene_ids, times=5)
            for key, value in zip(times, (theirs, ours, again), strict=True):
                times[key].append(value)
        ratios = [a / b for a, b in zip(times["upstream"], times["ours"], strict=True)]
        null = [a / b for a, b in zip(times["again"], times["ours"], strict=True)]
        n, seconds = matrix.shape[0], statistics.median(times["ours"])
        row = {
            "cells": name,
            "n": n,
            "tokens per cell": round(n_ours / n),
            "upstream cells/s": round(n / statistics.median(times["upstream"])),
            "ours cells/s": round(n / seconds),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "null": statistics.median(null),
        }
        rows.append(row)
        print(
            f"{name}: {n} cells of {row['tokens per cell']} tokens, CPU time of one core, {arguments.repeats} repeats\n"
            f"  upstream {row['upstream cells/s']:,} cells/s, ours {row['ours cells/s']:,} cells/s\n"
            f"  ratio {row['ratio']:.1f} [{min(ratios):.1f} - {max(ratios):.1f}], "
            f"null (ours / ours) {row['null']:.2f} [{min(null):.2f} - {max(null):.2f}]"
        )
    write_report(arguments.json, __file__, rows, threads=1)


if __name__ == "__main__":
    main()
