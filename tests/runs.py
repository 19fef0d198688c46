"""Whole runs through the public interface, in processes that are killed, interrupted, or several.

``python runs.py kill FOLDER SEED``: runs once undisturbed; then again and again with SIGKILL at random moments until one
comes to its end. ``python runs.py interrupt FOLDER``: trains a strategy for ever, to be interrupted. ``torchrun runs.py
launch FOLDER``: a run by several processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

import scdlkit as sk
from scdlkit.foundation import AdapterConfig, HeadConfig, LoRAConfig, TrainingConfig

CHECKPOINT = Path(__file__).parent / "data" / "golden" / "flash_keys"
CONFIGS = {
    "head": HeadConfig(training=TrainingConfig(max_epochs=6)),
    "lora": LoRAConfig(training=TrainingConfig(max_epochs=4, batch_size=16)),
    "a/b adapter": AdapterConfig(bottleneck=4, training=TrainingConfig(max_epochs=5, batch_size=16)),
}
WITHOUT_DROPOUT = {**CONFIGS, "lora": replace(CONFIGS["lora"], dropout=0.0)}


def cells(n: int = 150) -> ad.AnnData:
    """Real blood cells of 4 types."""
    blood = sc.datasets.pbmc68k_reduced()
    kept = blood.obs["bulk_labels"].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B", "CD56+ NK"])
    chosen = np.flatnonzero(kept)[:n]
    obs = pd.DataFrame({"cell_type": blood.obs["bulk_labels"].astype(str).to_numpy()[chosen]}, blood.obs_names[chosen])
    return ad.AnnData(blood.raw.X[chosen].copy(), obs=obs, var=pd.DataFrame(index=blood.raw.var_names))


def runner(**options) -> sk.AnnotationRunner:
    settings = {
        "checkpoint": CHECKPOINT,
        "strategies": ("frozen_probe", *CONFIGS),
        "strategy_configs": CONFIGS,
        "n_repeats": 2,
        "max_length": 100,
        "device": "cpu",
        "progress": False,
    }
    return sk.AnnotationRunner(**{**settings, **options})


def run(folder: Path, *, name: str, adata: ad.AnnData, resume: bool, **options) -> None:
    """A run, and what came out of it as files ``name``.*, written by the first process."""
    fitted = runner(**options)
    fitted.fit_compare(adata, output_dir=folder / name, resume=resume)
    predicted = {strategy: fitted.predict(adata, strategy=strategy) for strategy in fitted.results_["strategy"]}
    fitted.save(folder / f"{name}-model")
    if os.environ.get("RANK", "0") != "0":
        return
    for table in ("results_", "folds_", "history_", "per_class_", "differences_"):
        getattr(fitted, table).to_csv(folder / f"{name}-{table}.csv", index=False)
    np.savez(folder / f"{name}.npz", **{strategy: found["probabilities"] for strategy, found in predicted.items()})


def kill(folder: Path, seed: int) -> None:
    import peft  # noqa: F401  # with the fit below all that a run loads, so that it is killed at work
    import torch

    torch.set_num_threads(1)
    adata = cells()
    runner(strategies=("frozen_probe",), strategy_configs={}, n_repeats=1).fit_compare(adata)

    def one(name: str, *, resume: bool) -> int:
        """A run in a process of its own."""
        process = os.fork()
        if process == 0:
            run(folder, name=name, adata=adata, resume=resume)
            os._exit(0)
        return process

    started = time.perf_counter()
    os.waitpid(one("whole", resume=False), 0)
    duration = time.perf_counter() - started
    rng = np.random.default_rng(seed)
    found: list[list[str]] = []
    while True:
        process = one("killed", resume=True)
        if len(found) < 5:
            time.sleep(rng.uniform(0.05, 0.3) * duration)
            os.kill(process, signal.SIGKILL)
        if os.waitpid(process, 0)[1] == 0:
            break
        state = folder / "killed" / "training"
        found.append(sorted(str(path.relative_to(state)) for path in state.rglob("*.pt")))
    (folder / "kill.json").write_text(json.dumps(found))


def interrupt(folder: Path) -> None:
    # a shell has it ignored by what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    forever = TrainingConfig(max_epochs=10**6, patience=10**6)
    fitted = runner(
        strategies=("frozen_probe", "a/b adapter", "head"),
        strategy_configs={"a/b adapter": AdapterConfig(training=forever)},
        baselines=(),
        n_repeats=1,
    )
    adata = cells()
    fitted.fit_compare(adata, output_dir=folder)
    fitted.annotate_adata(adata)
    (folder / "labels.json").write_text(json.dumps([fitted.best_strategy_, fitted.interrupted_]))
    fitted.results_.to_csv(folder / "results.csv", index=False)


def without_dropout(folder: Path) -> Path:
    """The checkpoint without dropout, which processes draw for themselves."""
    target = shutil.copytree(CHECKPOINT, folder / f"checkpoint-{os.environ.get('RANK', 'alone')}")
    args = json.loads((target / "args.json").read_text())
    (target / "args.json").write_text(json.dumps({**args, "dropout": 0.0}))
    return target


def alone(folder: Path) -> None:
    options = {"n_repeats": 1, "checkpoint": without_dropout(folder), "strategy_configs": WITHOUT_DROPOUT}
    run(folder, name="alone", adata=cells(), resume=False, **options)


def launch(folder: Path) -> None:
    adata = cells()
    options = {"n_repeats": 1, "checkpoint": without_dropout(folder), "strategy_configs": WITHOUT_DROPOUT}
    run(folder, name="together", adata=adata, resume=False, **options)
    sk.tl.adapt_annotation(
        adata,
        checkpoint=CHECKPOINT,
        strategies=("frozen_probe", "lora"),
        strategy_configs={"lora": CONFIGS["lora"]},
        baselines=(),
        output_dir=folder / "adapted",
        device="cpu",
    )
    np.savez(
        folder / f"labels-{os.environ['RANK']}.npz", **{key: adata.obs[key] for key in adata.obs if key != "cell_type"}
    )


if __name__ == "__main__":
    action, where = globals()[sys.argv[1]], Path(sys.argv[2])
    action(where, *map(int, sys.argv[3:]))
