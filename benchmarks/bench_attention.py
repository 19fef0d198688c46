"""Attention of a frozen encoder on the CPU: one compiled loop against PyTorch's products, interleaved, with a null control.

    OMP_NUM_THREADS=1 python benchmarks/bench_attention.py [--json attention.json]

Cells of 235 and 1,200 genes with 8 heads of 64 (whole-human's shape) and of 250 genes with 4 heads of 16, on random
numbers; one thread. "PyTorch's products" is what runs where the loop cannot: torch.bmm, and between its two calls a
compiled softmax. Wall time, median [range] of the ratios of neighbouring runs; GFLOP/s count the two products alone.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import pandas as pd
import torch
from _report import add_json_option, write_report

from scdlkit.foundation._cell_attention import Scratch, attend_each
from scdlkit.foundation._fused_attention import attend_packed, can_fuse

SHAPES = {  # tokens of a cell, heads, width of a head
    "235 genes, 8 heads of 64": (236, 8, 64),
    "1,200 genes, 8 heads of 64": (1201, 8, 64),
    "250 genes, 4 heads of 16": (251, 4, 16),
}
TOKENS = 4096  # at a time, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    add_json_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measured(name, dtype, args.repeats)
        for name, (_, _, width) in SHAPES.items()
        for dtype in (torch.float32, torch.bfloat16)
        if can_fuse(dtype, width)
    ]
    if not rows:
        sys.exit("This processor has neither AVX-512 nor AVX2 with FMA: PyTorch's products run everywhere.")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, formatters={"apart": "{:.0e}".format}, float_format="{:.2f}".format))
    write_report(args.json, __file__, table, threads=1)


def measured(name: str, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    length, n_heads, width = SHAPES[name]
    n_cells = TOKENS // length
    draws = torch.Generator().manual_seed(0)
    qkv = torch.randn((n_cells * length, 3 * n_heads * width), generator=draws)
    qkv[:, : n_heads * width] /= width**0.5
    ways = {"theirs": attend_each, "ours": attend_packed, "again": attend_each}
    outs = {way: torch.empty((len(qkv), n_heads * width), dtype=dtype) for way in ways}
    given, starts, scratch = qkv.to(dtype), np.arange(n_cells + 1) * length, Scratch()

    def seconds(way: str) -> float:
        start = time.perf_counter()
        ways[way](given, n_heads, starts, outs[way], scratch)
        return time.perf_counter() - start

    for way in ways:  # compiles
        seconds(way)
    times = pd.DataFrame([{way: seconds(way) for way in ways} for _ in range(repeats)])
    gflop = 4 * n_cells * length**2 * n_heads * width / 1e9
    ratios, null = times["theirs"] / times["ours"], times["theirs"] / times["again"]
    return {
        "cells": name,
        "type": str(dtype).removeprefix("torch."),
        "theirs GFLOP/s": round(gflop / times["theirs"].median()),
        "ours GFLOP/s": round(gflop / times["ours"].median()),
        "ratio": ratios.median(),
        "lowest": ratios.min(),
        "highest": ratios.max(),
        "null": null.median(),
        "null lowest": null.min(),
        "null highest": null.max(),
        "apart": float((outs["theirs"].float() - outs["ours"].float()).abs().max()),
    }


if __name__ == "__main__":
    main()
