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
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from _report import add_json_option, write_report

from scdlkit.foundation import frozen
from scdlkit.foundation._cell_attention import Scratch
from scdlkit.foundation._fused_attention import can_fuse

SHAPES = {"235 genes, 8 heads of 64": (236, 8, 64), "1,200 genes, 8 heads of 64": (1201, 8, 64)}
SHAPES["250 genes, 4 heads of 16"] = (251, 4, 16)
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
    print(table.to_string(index=False))
    write_report(args.json, __file__, table, threads=1)


def measured(name: str, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    length, n_heads, width = SHAPES[name]
    n_cells = TOKENS // length
    draws = torch.Generator().manual_seed(0)
    qkv = torch.randn((n_cells * length, 3 * n_heads * width), generator=draws)
    qkv[:, : n_heads * width] /= width**0.5
    given = qkv.to(dtype), n_heads, np.arange(n_cells + 1) * length, Scratch()

    def theirs() -> torch.Tensor:
        real, frozen.can_fuse = frozen.can_fuse, lambda *_: False
        try:
            return frozen._attend(*given)
        finally:
            frozen.can_fuse = real

    def ours() -> torch.Tensor:
        return frozen._attend(*given)

    apart = float((theirs().float() - ours().float()).abs().max())
    times = np.array([[timed(call) for call in (theirs, ours, theirs)] for _ in range(repeats)])
    gflop = 4 * n_cells * length**2 * n_heads * width / 1e9
    return {
        "cells": name,
        "type": str(dtype).removeprefix("torch."),
        "PyTorch's products, GFLOP/s": round(gflop / np.median(times[:, 0])),
        "the loop, GFLOP/s": round(gflop / np.median(times[:, 1])),
        "times as fast": spread(times[:, 0] / times[:, 1]),
        "null": spread(times[:, 0] / times[:, 2]),
        "apart": f"{apart:.0e}",
    }


def timed(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(ratios: np.ndarray) -> str:
    return f"{np.median(ratios):.2f} [{ratios.min():.2f} - {ratios.max():.2f}]"


if __name__ == "__main__":
    main()
