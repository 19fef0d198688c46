"""Strategies inside the encoder: what their defaults rest on.

    python benchmarks/bench_strategies.py defaults cells.h5ad [more.h5ad] --out defaults.jsonl

Fits every strategy once for each learning rate of a grid, and for other values of the setting that matters most beside
it, on subsets of labelled data sets. Each fit adds a line to ``--out``; the same command goes on where it was stopped,
and prints the table at the end (``--summary``: only that). Validation macro-F1 alone is recorded: defaults must not be
chosen by test cells.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import scdlkit as sk
from scdlkit.foundation import get_strategy

# Settings that are tried one by one around the defaults: learning rates, and one more.
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "head": {"learning_rate": (1e-3, 3e-3, 1e-2)},
    "lora": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2), "rank": (4, 16)},
    "adapter": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2), "bottleneck": (16, 64)},
    "prefix_tuning": {"learning_rate": (1e-3, 5e-3, 2e-2, 5e-2), "length": (4, 64)},
    "ia3": {"learning_rate": (1e-3, 5e-3, 2e-2, 5e-2)},
    "bitfit": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2)},
    "full_finetune": {"learning_rate": (3e-5, 1e-4, 3e-4, 1e-3), "layer_decay": (0.8, 1.0)},
}


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Strategy, and what differs from its defaults; the defaults once."""
    for name, settings in GRID.items():
        default = get_strategy(name)().config
        yield name, {}
        for setting, values in settings.items():
            at = default.training.learning_rate if setting == "learning_rate" else getattr(default, setting)
            yield from ((name, {setting: value}) for value in values if value != at)


def subset(path: Path, n_cells: int, label_key: str) -> ad.AnnData:
    """Random labelled cells of a file, the same for every fit."""
    adata = ad.read_h5ad(path)
    labelled = np.flatnonzero(adata.obs[label_key].notna())
    chosen = np.random.default_rng(0).permutation(labelled)[:n_cells]
    return adata[np.sort(chosen)].copy()


def fit(adata: ad.AnnData, name: str, changes: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict:
    """One fit with the settings of a job; what is recorded of it."""
    config = get_strategy(name)().config
    training = replace(config.training, **{k: v for k, v in changes.items() if k == "learning_rate"})
    if name != "head":  # on the embedding, where a hundred epochs are seconds
        training = replace(training, max_epochs=arguments.epochs, patience=arguments.epochs, batch_size=arguments.batch)
    config = replace(config, training=training, **{k: v for k, v in changes.items() if k != "learning_rate"})
    runner = sk.AnnotationRunner(
        arguments.label_key,
        checkpoint=arguments.checkpoint,
        strategies=(name,),
        baselines=(),
        strategy_configs={name: config},
        val_size=0.3,
        small_classes="drop",
        max_length=arguments.max_length,
        random_state=seed,
        progress=False,
    )
    row = runner.fit_compare(adata).iloc[0]
    settings = {"learning_rate": training.learning_rate}
    settings |= {key: getattr(config, key) for key in GRID[name] if key != "learning_rate"}
    return {
        "settings": settings,
        "val_macro_f1": row["val_macro_f1"],
        "best_epoch": int(runner.history_.sort_values("val_macro_f1")["epoch"].iloc[-1]),
        "n_trainable": int(row["n_trainable"]),
        "seconds": round(row["fit_seconds"], 1),
    }


def run(arguments: argparse.Namespace) -> None:
    """All fits that ``--out`` does not hold yet."""
    done = {line["job"] for line in read(arguments.out)}
    conditions = [arguments.checkpoint, arguments.cells, arguments.max_length, arguments.epochs, arguments.batch]
    data = {path.stem: subset(path, arguments.cells, arguments.label_key) for path in arguments.files}
    for seed in range(arguments.seeds):
        for stem, adata in data.items():
            for name, changes in jobs():
                default = get_strategy(name)().config
                full = {"learning_rate": default.training.learning_rate}
                full |= {key: getattr(default, key) for key in GRID[name] if key != "learning_rate"} | changes
                job = json.dumps([stem, seed, name, full, conditions])
                if job in done:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    found = fit(adata, name, changes, seed, arguments)
                line = {"job": job, "data": stem, "seed": seed, "strategy": name, **found}
                with arguments.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(path: Path) -> str:
    """Validation macro-F1 of each setting: mean over data sets and seeds, and of each data set."""
    lines = pd.DataFrame(read(path))
    lines["settings"] = [
        ", ".join(f"{key} {value:g}" for key, value in settings.items()) for settings in lines["settings"]
    ]
    by = lines.groupby(["strategy", "settings"], sort=False)["val_macro_f1"]
    table = by.agg(["mean", "count"]).join(
        lines.pivot_table(index=["strategy", "settings"], columns="data", values="val_macro_f1")
    )
    return table.round(3).to_string()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    defaults = modes.add_parser("defaults", help="a grid around the default settings")
    defaults.add_argument("files", nargs="*", type=Path)
    defaults.add_argument("--out", type=Path, required=True)
    defaults.add_argument("--checkpoint", default="mini")
    defaults.add_argument("--label-key", default="cell_type")
    defaults.add_argument("--cells", type=int, default=500)
    defaults.add_argument("--max-length", type=int, default=128)
    defaults.add_argument("--epochs", type=int, default=8)
    defaults.add_argument("--batch", type=int, default=32)
    defaults.add_argument("--seeds", type=int, default=2)
    defaults.add_argument("--summary", action="store_true")
    arguments = parser.parse_args()
    sk.settings.verbosity = "ERROR"
    if not arguments.summary:
        run(arguments)
    print(summary(arguments.out))


if __name__ == "__main__":
    main()
