"""Embedding and full fine-tuning on a CUDA device, against what it reaches in multiplying matrices.

    python benchmarks/bench_gpu.py [--tokens 1024] [--cells 4096] [--repeats 5] [--json gpu.json]

Random weights in the shape of whole-human; training once without CUDA graphs as well. Flash attention must run: the profiler
is asked whether it does, and the benchmark fails if not. All cells have as many tokens, but for the rows where lengths
differ by half. Everything runs interleaved in one process, embedding and training a second time against themselves (null
control), and between them one large bf16 product, which is the ceiling. Cells/s and shares are medians, times are wall
times to the arrays on the host or to the end of the last step; memory is what PyTorch took from the GPU while a row ran for
the first times. Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from _report import add_json_option, write_report
from bench_adapt import N_CLASSES, Source
from bench_embed import CLS, N_TOKENS, PAD, cells_of
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

import scdlkit as sk
from scdlkit.foundation import CellData, ScGPTConfig, embed_tokens
from scdlkit.foundation._fit import Fit
from scdlkit.foundation.inference import normalise
from scdlkit.foundation.strategies import build_strategies

SHAPE = ScGPTConfig(N_TOKENS, 512, 8, 512, 12)
BATCH = 64
OTHERS = ("lora", "adapter", "ia3", "bitfit")
_SIDE = 8192  # of the matrices
_NULL = " again (null)"


def operations(lengths: np.ndarray) -> float:
    """Floating-point operations of a forward pass through the blocks, ``<cls>`` alone in the last."""
    width, hidden, whole = SHAPE.embsize, SHAPE.d_hid, SHAPE.nlayers - 1
    tokens = lengths.astype(np.float64) + 1
    products = 2 * (4 * width**2 + 2 * width * hidden)  # of a token in a block
    attention = 4 * width * tokens  # of a query
    last = 2 * tokens * 2 * width**2 + (products - 4 * width**2) + attention
    return float((whole * tokens * (products + attention) + last).sum())


def product(device: torch.device) -> Callable[[], object]:
    """A large product, ten times."""
    one, other = (torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def run() -> None:
        for _ in range(10):
            one @ other

    return run


def training(
    source: Source, cells: CellData, device: torch.device, name: str = "full_finetune", **options: bool
) -> Callable[[], object]:
    """An epoch of a strategy."""
    (strategy,) = build_strategies((name,))
    config = replace(strategy.config.training, batch_size=BATCH, max_epochs=1000, precision="bf16", **options)
    strategy.config = replace(strategy.config, training=config)
    strategy.source = source
    strategy._rows = cells.tokens.genes()
    strategy.build(cells, n_classes=N_CLASSES, seed=0)
    fit = Fit(strategy, cells, class_weights=np.ones(N_CLASSES, np.float32), seed=0, device=device)
    fit.compile()
    bar = tqdm(disable=True)
    return lambda: fit.run_epoch(bar)


def seconds_of(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def attention_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels for attention that ran."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    words = ("flash", "fmha", "sdpa", "softmax", "cutlassf", "cutlassb")
    names = {event.key for event in found.key_averages() if event.self_device_time_total > 0}
    return sorted(name for name in names if any(word in name.lower() for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of a cell, <cls> included")
    parser.add_argument("--cells", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    add_json_option(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_gpu.py measures a CUDA device, and PyTorch sees none on this machine.\n")
    sk.settings.verbosity = "WARNING"
    device = torch.device("cuda")
    source = Source(SHAPE)
    encoder = source.whole.eval()
    rng = np.random.default_rng(0)
    n_trained = max(BATCH, arguments.cells // 4 // BATCH * BATCH)
    alike = np.full(arguments.cells, arguments.tokens - 1)
    tokens, mixed = cells_of(alike), cells_of(rng.integers(arguments.tokens // 2, arguments.tokens, len(alike)))
    trained, trained_mixed = (
        CellData(
            embedding=rng.standard_normal((n_trained, SHAPE.embsize)).astype(np.float32),
            tokens=cells[np.arange(n_trained)],
            codes=np.arange(n_trained) % N_CLASSES,
        )
        for cells in (tokens, mixed)
    )

    def embedding(cells, precision: str = "bf16") -> Callable[[], np.ndarray]:
        special = {"cls_id": CLS, "pad_id": PAD, "progress": False}
        return lambda: embed_tokens(encoder, cells, device=device, precision=precision, **special)

    def epochs(cells: CellData = trained, name: str = "full_finetune", **options: bool):
        return lambda: training(source, cells, device, name, **options)

    # how many cells, how many operations, what makes what is run
    work = operations(alike)
    # twice as much on the way back, if weights have gradients
    step, mixed_step = (3 * operations(cells.lengths[:n_trained]) for cells in (tokens, mixed))
    cases = {
        "matrix product": (0, 10 * 2.0 * _SIDE**3, lambda: product(device)),
        "embed": (len(alike), work, lambda: embedding(tokens)),
        "embed" + _NULL: (len(alike), work, lambda: embedding(tokens)),
        "embed, fp16": (len(alike), work, lambda: embedding(tokens, "fp16")),
        "embed, fp16, mixed lengths": (len(alike), operations(mixed.lengths), lambda: embedding(mixed, "fp16")),
        "full_finetune": (n_trained, step, epochs()),
        "full_finetune" + _NULL: (n_trained, step, epochs()),
        "full_finetune, mixed lengths": (n_trained, mixed_step, epochs(trained_mixed)),
        "full_finetune, no graphs": (n_trained, step, epochs(cuda_graphs=False)),
        "full_finetune, mixed lengths, no graphs": (n_trained, mixed_step, epochs(trained_mixed, cuda_graphs=False)),
        "full_finetune, compiled": (n_trained, step, epochs(compile=True)),
        **{name: (n_trained, step, epochs(name=name)) for name in OTHERS},
    }
    kernels, runs, memory = {}, {}, {}
    for name, (n_cells, _, make) in cases.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        run = runs[name] = make()
        # with all that is compiled, planned or recorded
        first, second = seconds_of(run), seconds_of(run)
        memory[name] = (torch.cuda.max_memory_reserved() - before) / 1e9
        print(f"{name}: the first time {first:.1f} s, the second {second:.1f} s, {memory[name]:.1f} GB", flush=True)
        if n_cells and not name.endswith(_NULL):
            kernels[name] = attention_kernels(run)
            if not any("flash" in kernel.lower() for kernel in kernels[name]):
                raise SystemExit(f"{name}: no flash attention ran, only {', '.join(kernels[name]) or 'none at all'}.")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(arguments.repeats):
        for name, (n_cells, _, _) in cases.items():
            seconds[name].append(seconds_of(runs[name]))
            print(f"{repeat + 1}: {name} {n_cells / seconds[name][-1]:.0f} cells/s", flush=True)
    ceiling = cases["matrix product"][1] / np.array(seconds["matrix product"])
    nulls = {name: np.array(seconds[name]) / np.array(seconds[name + _NULL]) for name in ("embed", "full_finetune")}
    rows = []
    print(f"{torch.cuda.get_device_name()}, {arguments.tokens} tokens, ceiling {np.median(ceiling) / 1e12:.0f} TFLOP/s")
    few = tokens[np.arange(64)]
    exact, *others = (normalise(embedding(few, precision)()) for precision in ("fp32", "bf16", "fp16"))
    print("largest error of the unit embedding:", ", ".join(f"{np.abs(other - exact).max():.0e}" for other in others))
    for name, null in nulls.items():
        print(f"{name} against itself: {np.median(null):.3f} [{null.min():.3f} - {null.max():.3f}]")
    for name, (n_cells, n_operations, _) in cases.items():
        taken = np.array(seconds[name])
        shares = n_operations / taken / ceiling
        rows.append(
            {
                "what": name,
                "tokens": arguments.tokens,
                "cells_per_second": n_cells / float(np.median(taken)),
                "tflops": n_operations / float(np.median(taken)) / 1e12,
                "share_of_ceiling": float(np.median(shares)),
                "lowest": float(shares.min()),
                "highest": float(shares.max()),
                "gigabytes": memory[name],
                "null": float(np.median(nulls["embed" if "embed" in name else "full_finetune"])),
                "repeats": arguments.repeats,
                "attention": kernels.get(name, []),
            }
        )
        if n_cells:
            print(
                "{what:40} {cells_per_second:9.1f} cells/s {tflops:7.1f} TFLOP/s  {share_of_ceiling:6.1%} of the ceiling "
                "[{lowest:.1%} - {highest:.1%}] {gigabytes:5.1f} GB".format(**rows[-1])
            )
    write_report(arguments.json, __file__, rows)


if __name__ == "__main__":
    main()
