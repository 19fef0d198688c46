"""All strategies: what their defaults rest on, how they compare, and what an epoch costs on a large encoder.

    python benchmarks/bench_strategies.py defaults cells.h5ad [more.h5ad] --out defaults.jsonl
    python benchmarks/bench_strategies.py defaults … --only attention_dropout --seeds 5 --out dropout.jsonl
    python benchmarks/bench_strategies.py table cells.h5ad [more.h5ad] --out table/ --repeats 5 [--group-key donor]
    python benchmarks/bench_strategies.py one-epoch --out one-epoch/ [--device cuda --precision auto]

The same command goes on where it was stopped. ``defaults`` fits every strategy once for each learning rate of a grid, and
for other values of the setting that matters most beside it, on subsets of labelled data sets; each fit adds a line to
``--out``, with validation macro-F1 alone, since defaults must not be chosen by test cells. ``table`` is the comparison
of every strategy and baseline through the public interface. ``one-epoch`` fits each on 700 blood cells for one epoch,
with random weights in the shape of whole-human (12 layers, 512 wide); the scores mean nothing there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from _report import add_json_option, write_report

import scdlkit as sk
from scdlkit.foundation import available_strategies, ensure_checkpoint, get_strategy, save_checkpoint
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder

# Settings that are tried one by one around the defaults: learning rates, and one more.
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "head": {"learning_rate": (1e-3, 3e-3, 1e-2)},
    "lora": {
        "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2),
        "rank": (4, 16),
        "attention_dropout": (True,),
        "precision": ("bf16",),
    },
    "adapter": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2), "bottleneck": (16, 64)},
    "prefix_tuning": {"learning_rate": (1e-3, 5e-3, 2e-2, 5e-2), "length": (4, 16, 64)},
    "ia3": {"learning_rate": (1e-3, 5e-3, 2e-2, 5e-2)},
    "bitfit": {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2)},
    "full_finetune": {
        "learning_rate": (3e-5, 1e-4, 3e-4, 1e-3),
        "layer_decay": (0.8, 1.0),
        "head_learning_rate": (1e-4, 1e-3, 1e-2),
        "attention_dropout": (True,),
        "precision": ("bf16",),
    },
}


def jobs(only: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Strategy, and what differs from its defaults; the defaults once. ``only``: settings that are varied."""
    for name, settings in GRID.items():
        varied = {setting: values for setting, values in settings.items() if only is None or setting in only}
        default = settings_of(get_strategy(name)().config, varied)
        if varied:
            yield name, {}
        for setting, values in varied.items():
            yield from ((name, {setting: value}) for value in values if value != default[setting])


def settings_of(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Settings of a strategy, or of its training, by name."""
    return {name: getattr(config.training if hasattr(config.training, name) else config, name) for name in names}


def subset(path: Path, n_cells: int | None, label_key: str) -> ad.AnnData:
    """Random labelled cells of a file, the same for every fit."""
    adata = ad.read_h5ad(path)
    labelled = np.flatnonzero(adata.obs[label_key].notna())
    chosen = np.random.default_rng(0).permutation(labelled)[:n_cells]
    return adata[np.sort(chosen)].copy()


def fit(adata: ad.AnnData, name: str, changes: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict:
    """One fit with the settings of a job; what is recorded of it."""
    config = get_strategy(name)().config
    trained = {setting: value for setting, value in changes.items() if hasattr(config.training, setting)}
    training = replace(config.training, **trained)
    if name != "head":  # on the embedding, where a hundred epochs are seconds
        training = replace(
            training, max_epochs=arguments.epochs, patience=arguments.patience, batch_size=arguments.batch
        )
    config = replace(config, training=training, **{k: v for k, v in changes.items() if k not in trained})
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
    return {
        "settings": settings_of(config, GRID[name]),
        "val_macro_f1": row["val_macro_f1"],
        "best_epoch": int(runner.history_.sort_values("val_macro_f1")["epoch"].iloc[-1]),
        "n_trainable": int(row["n_trainable"]),
        "seconds": round(row["fit_seconds"], 1),
    }


def run_defaults(arguments: argparse.Namespace) -> pd.DataFrame:
    """All fits that ``--out`` does not hold yet, and the table of all."""
    done = {line["job"] for line in read(arguments.out)}
    conditions = [
        getattr(arguments, name) for name in ("checkpoint", "cells", "max_length", "epochs", "patience", "batch")
    ]
    files = [] if arguments.summary else arguments.files
    data = {path.stem: subset(path, arguments.cells, arguments.label_key) for path in files}
    for seed in range(arguments.seeds):
        for stem, adata in data.items():
            for name, changes in jobs(arguments.only):
                full = settings_of(get_strategy(name)().config, GRID[name]) | changes
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
    table = summary(arguments.out)
    print(table.to_string())
    return table.reset_index()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(path: Path) -> pd.DataFrame:
    """Validation macro-F1 of each setting: mean over data sets and seeds, and of each data set."""
    lines = pd.DataFrame(read(path))
    lines["settings"] = [
        ", ".join(f"{key} {value if isinstance(value, str) else f'{value:g}'}" for key, value in settings.items())
        for settings in lines["settings"]
    ]
    by = lines.groupby(["strategy", "settings"], sort=False)["val_macro_f1"]
    table = by.agg(["mean", "count"]).join(
        lines.pivot_table(index=["strategy", "settings"], columns="data", values="val_macro_f1")
    )
    return table.round(3)


def with_epochs(name: str, **training: Any) -> Any:
    """A strategy's default config with some settings of its training changed; None where it has no training."""
    config = get_strategy(name)().config
    if not hasattr(config, "training"):
        return None
    return replace(config, training=replace(config.training, **training))


def installed(package: str) -> bool:
    """Whether an optional package is there; no package always is."""
    return not package or importlib.util.find_spec(package) is not None


def compare(adata: ad.AnnData, out: Path, training: dict[str, Any], **settings: Any) -> pd.DataFrame:
    """The table of every strategy and baseline; goes on with what ``out`` holds."""
    strategies = [name for name in available_strategies("strategy") if name != "any_peft"]
    configs = {name: with_epochs(name, **(training if name != "head" else {})) for name in strategies}
    runner = sk.AnnotationRunner(
        strategies=strategies,
        baselines=[name for name in available_strategies("baseline") if installed(get_strategy(name).package)],
        strategy_configs={name: config for name, config in configs.items() if config is not None},
        small_classes="drop",
        **settings,
    )
    table = runner.fit_compare(adata, output_dir=out, resume=True)
    table.to_csv(out / "results.csv", index=False)
    return table


def shown(table: pd.DataFrame) -> str:
    rows = table.assign(
        **{
            f"{part} macro-F1": [
                f"{mean:.3f} ± {sd:.3f}"
                for mean, sd in zip(table[f"{part}_macro_f1"], table[f"{part}_macro_f1_sd"], strict=True)
            ]
            for part in ("val", "test")
        },
        parameters=table["n_trainable"].map("{:,}".format),
        seconds=(table["fit_seconds"] + table["embed_seconds"]).round(1),
        MB=table["peak_memory_mb"].round(),
    )
    columns = ["strategy", "role", "val macro-F1", "test macro-F1", "parameters", "seconds", "MB", "n_fits", "error"]
    return rows[columns].to_string(index=False)


def run_table(arguments: argparse.Namespace) -> pd.DataFrame:
    tables = []
    for path in arguments.files:
        adata = subset(path, arguments.cells, arguments.label_key)
        table = compare(
            adata,
            arguments.out / path.stem,
            {"max_epochs": arguments.epochs, "batch_size": arguments.batch},
            label_key=arguments.label_key,
            group_key=arguments.group_key,
            checkpoint=arguments.checkpoint,
            n_repeats=arguments.repeats,
            leakage_gap=False,
            max_length=arguments.max_length,
        )
        print(f"{path.stem}: {adata.n_obs} cells, {arguments.repeats} repeats", shown(table), sep="\n", flush=True)
        tables.append(table.assign(data=path.stem))
    return pd.concat(tables)


def large_checkpoint(folder: Path) -> Path:
    """Random weights in the shape of whole-human, with the vocabulary of mini."""
    if not folder.exists():
        small = ensure_checkpoint("mini")
        args = {**small.args(), "embsize": 512, "nheads": 8, "d_hid": 512, "nlayers": 12, "dropout": 0.2}
        vocab = json.loads(small.vocab_path.read_text())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=max(vocab.values()) + 1))
        save_checkpoint(folder, encoder.state_dict(), args=args, vocab=vocab)
    return folder


def run_one_epoch(arguments: argparse.Namespace) -> pd.DataFrame:
    table = compare(
        sc.datasets.pbmc68k_reduced(),
        arguments.out,
        {"max_epochs": 1, "precision": arguments.precision},
        label_key="bulk_labels",
        checkpoint=large_checkpoint(arguments.out / "checkpoint"),
        max_length=arguments.max_length,
        device=arguments.device,
    )
    columns = ["strategy", "n_trainable", "fit_seconds", "embed_seconds", "peak_memory_mb", "error"]
    print(table[columns].round(1).to_string(index=False))
    return table[columns]


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
    defaults.add_argument("--patience", type=int, default=10)
    defaults.add_argument("--batch", type=int, default=32)
    defaults.add_argument("--only", nargs="+", help="settings that are varied; all by default")
    defaults.add_argument("--seeds", type=int, default=2)
    defaults.add_argument("--summary", action="store_true")
    defaults.set_defaults(action=run_defaults)
    table = modes.add_parser("table", help="every strategy and baseline")
    table.add_argument("files", nargs="+", type=Path)
    table.add_argument("--out", type=Path, required=True, help="folder")
    table.add_argument("--checkpoint", default="mini")
    table.add_argument("--label-key", default="cell_type")
    table.add_argument("--group-key")
    table.add_argument("--repeats", type=int, default=5)
    table.add_argument("--cells", type=int, help="random cells of each file; all by default")
    table.add_argument("--max-length", type=int)
    table.add_argument("--epochs", type=int, default=30)
    table.add_argument("--batch", type=int, default=64)
    table.set_defaults(action=run_table)
    one_epoch = modes.add_parser("one-epoch", help="what an epoch costs on a large encoder")
    one_epoch.add_argument("--out", type=Path, required=True, help="folder")
    one_epoch.add_argument("--max-length", type=int)
    one_epoch.add_argument("--device")
    one_epoch.add_argument("--precision", default="fp32")
    one_epoch.set_defaults(action=run_one_epoch)
    for mode in modes.choices.values():
        add_json_option(mode)
    arguments = parser.parse_args()
    sk.settings.verbosity = "WARNING"
    write_report(arguments.json, __file__, arguments.action(arguments))


if __name__ == "__main__":
    main()
