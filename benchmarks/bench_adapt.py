"""A training step of every strategy against a step of full fine-tuning as scGPT does it, interleaved, with a null control.

    python benchmarks/bench_adapt.py [--threads 2] [--json adapt.json]

Random weights in the shape of whole-human, random cells of about 233 tokens, 8 cells a step. The baseline is PyTorch's
``nn.TransformerEncoder`` with upstream's input layers, annotation head, dropout, padding and an AdamW over everything.
Ours is what ``sk.tl.adapt_annotation`` runs for each epoch: batches of similar length, dropout, clipping, schedule; with
``layers="last:2"`` from the states of the ten blocks below, whose computation, once, is reported apart. CPU time of an
epoch over the same cells, or wall time with several threads; median [range] of ratios of neighbouring runs. Also printed is
the share of padding, of these few cells and of 2,000 such, where more are of like length.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import add_json_option, write_report
from bench_embed import CLS, N_TOKENS, PAD, Upstream, cells_of
from torch import Tensor, nn
from tqdm.auto import tqdm

import scdlkit as sk
from scdlkit.foundation import AnnotationHead, CellData, ScGPTConfig, ScGPTEncoder
from scdlkit.foundation._fit import Fit
from scdlkit.foundation.batching import collate
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.strategies import build_strategies

N_CLASSES, BATCH = 10, 8
NAMES = ("full_finetune", "lora", "ia3", "adapter", "prefix_tuning", "bitfit", "lora last:2")


class Source:
    """Where strategies take their encoder from."""

    cls_id, pad_id = CLS, PAD

    def __init__(self, config: ScGPTConfig) -> None:
        torch.manual_seed(0)
        self.whole = ScGPTEncoder(config)

    def encoder(self, token_ids: np.ndarray) -> ScGPTEncoder:
        ids = np.union1d(token_ids, [CLS, PAD])
        encoder = ScGPTEncoder(self.whole.config, ids)
        weights = self.whole.state_dict()
        weights["gene_embedding.weight"] = weights["gene_embedding.weight"][torch.from_numpy(ids)]
        encoder.load_state_dict(weights)
        return encoder

    def gene_rows(self, token_ids: np.ndarray) -> Tensor:
        return self.whole.gene_embedding.weight.detach()[torch.from_numpy(token_ids)]


class UpstreamTraining:
    """Full fine-tuning as scGPT's tutorial does it."""

    def __init__(self, source: Source, cells: CellData) -> None:
        encoder = source.encoder(np.arange(N_TOKENS))
        self.inputs, self.body, self.head = encoder, Upstream(encoder).train(), AnnotationHead(512, N_CLASSES)
        # the blocks of `encoder` are copied into `body`; of `encoder` itself only the input layers train
        parameters = [*encoder.gene_embedding.parameters(), *encoder.gene_norm.parameters()]
        parameters += [*encoder.value_encoder.parameters(), *self.body.blocks.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.cells = cells

    def epoch(self) -> None:
        self.inputs.train()
        order = np.random.default_rng(0).permutation(self.cells.n_cells)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = collate(self.cells.tokens[rows], cls_id=CLS, pad_id=PAD, pad_value=-2)
            self.optimizer.zero_grad()
            logits = self.head(self.body(batch.gene_ids, batch.values, batch.padding_mask))
            nn.functional.cross_entropy(logits, torch.from_numpy(self.cells.codes[rows])).backward()
            self.optimizer.step()


def ours(source: Source, cells: CellData, name: str, training: dict[str, Any]) -> Callable[[], None]:
    """An epoch of a strategy."""
    plain, _, layers = name.partition(" ")
    (strategy,) = build_strategies((plain,))
    changes = {"layers": layers} if layers else {}
    config = replace(strategy.config.training, batch_size=BATCH, max_epochs=1000, **training)
    strategy.config = replace(strategy.config, training=config, **changes)
    strategy.source = source
    strategy._rows = cells.tokens.genes()
    start = time.process_time()
    strategy.build(cells, n_classes=N_CLASSES, seed=0)
    if layers:
        print(f"{name}: {time.process_time() - start:.1f} s for the states of {cells.n_cells} cells, once", flush=True)
    fit = Fit(strategy, cells, class_weights=np.ones(N_CLASSES, np.float32), seed=0, device=torch.device("cpu"))
    bar = tqdm(disable=True)
    return lambda: fit.run_epoch(bar)


def padding_shares(lengths: np.ndarray) -> dict[str, float]:
    """Share of the tokens of an epoch that are padding, in our batches and in shuffled ones."""
    (strategy,) = build_strategies(("full_finetune",))
    cells = CellData(tokens=cells_of(lengths))
    order = np.random.default_rng(0).permutation(len(lengths))
    batches = {
        "ours": strategy.batches(cells, BATCH, torch.Generator().manual_seed(0)),
        "shuffled": [order[start : start + BATCH] for start in range(0, len(order), BATCH)],
    }
    padded = {name: sum(len(rows) * (lengths[rows].max() + 1) for rows in found) for name, found in batches.items()}
    return {name: float(1 - (lengths + 1).sum() / n) for name, n in padded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=233, help="of a cell, about")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="strategies; all by default")
    add_json_option(parser)
    arguments = parser.parse_args()
    sk.settings.verbosity = "ERROR"
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    low, high = round(0.77 * arguments.tokens), round(1.23 * arguments.tokens)
    source = Source(ScGPTConfig(N_TOKENS, 512, 8, 512, 12))
    cells = CellData(
        embedding=rng.standard_normal((arguments.cells, 512)).astype(np.float32),
        tokens=cells_of(rng.integers(low, high, arguments.cells)),
        codes=np.arange(arguments.cells) % N_CLASSES,
    )
    padding = {n: padding_shares(rng.integers(low, high, n)) for n in (arguments.cells, 2000)}
    for n, shares in padding.items():
        print(f"padding, {n} cells: " + ", ".join(f"{share:.1%} {name}" for name, share in shares.items()), flush=True)
    place = Path(tempfile.gettempdir())
    cells = replace(cells, states=LowerStates(cells.tokens, source, torch.device("cpu"), place).rows)
    upstream = UpstreamTraining(source, cells)
    runs: dict[str, Callable[[], Any]] = {"upstream": upstream.epoch, "upstream again (null)": upstream.epoch}
    runs["full_finetune, attention dropout"] = ours(source, cells, "full_finetune", {"attention_dropout": True})
    runs |= {name: ours(source, cells, name, {}) for name in arguments.only}
    runs |= {f"{name}, bf16": ours(source, cells, name, {"precision": "bf16"}) for name in ("full_finetune", "lora")}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    rows = []
    for name, taken in seconds.items():
        ratios = np.array(seconds["upstream"]) / np.array(taken)
        rows.append(
            {
                "what": name,
                "threads": arguments.threads,
                "seconds_per_step": float(np.median(taken)) * BATCH / arguments.cells,
                "ratio": float(np.median(ratios)),
                "lowest": float(ratios.min()),
                "highest": float(ratios.max()),
            }
        )
        print(
            "{what:34} {seconds_per_step:6.2f} s a step  {ratio:5.2f} [{lowest:.2f} - {highest:.2f}]".format(**rows[-1])
        )
    rows += [{"what": f"share of padding, {n} cells", **shares} for n, shares in padding.items()]
    write_report(arguments.json, __file__, rows, threads=arguments.threads)


if __name__ == "__main__":
    main()
