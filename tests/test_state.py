"""A run that was killed, interrupted, or shared among processes is the run that was not."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scdlkit as sk
from scdlkit.foundation import FrozenProbeConfig, HeadConfig, TrainingConfig
from scdlkit.foundation.training import Trainer

SCRIPT = str(Path(__file__).with_name("runs.py"))
TRAIN = Trainer.train
COSTS = ["fit_seconds", "embed_seconds", "peak_memory_mb", "rank"]  # rank: by time, where the scores are equal
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SCDLKIT_PROGRESS": "0", "MPLBACKEND": "Agg"}


def tables(folder: Path, name: str) -> dict[str, pd.DataFrame]:
    found = {path.name.removeprefix(f"{name}-"): pd.read_csv(path) for path in folder.glob(f"{name}-*.csv")}
    return {key: table.drop(columns=[c for c in COSTS if c in table]) for key, table in found.items()}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    seed = str(np.random.SeedSequence().entropy % 2**32)  # other moments in every run of the tests
    result = subprocess.run(
        [sys.executable, SCRIPT, "kill", str(folder), seed],
        capture_output=True,
        text=True,
        timeout=1200,
        env=ENVIRONMENT,
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_random_moments_and_resumed_is_the_same(killed):
    found = json.loads((killed / "kill.json").read_text())
    assert len(found) == 5 and found[-1]
    whole, again = tables(killed, "whole"), tables(killed, "killed")
    assert len(whole) == 5 and whole.keys() == again.keys()
    for name in whole:
        order = [c for c in ("strategy", "reference", "split", "class", "repeat", "epoch") if c in whole[name]]
        one, two = (table.sort_values(order, ignore_index=True) for table in (whole[name], again[name]))
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    first, second = (np.load(killed / f"{name}.npz") for name in ("whole", "killed"))
    assert set(first) == set(second) == {"frozen_probe", "head", "lora", "a/b adapter", "pca_logreg"}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    first, second = (
        torch.load(killed / f"{name}-model" / "model_state.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_what_a_finished_run_leaves_on_disk(killed):
    left = {str(path.relative_to(killed / "killed")) for path in (killed / "killed").rglob("*") if path.is_file()}
    left = {path for path in left if not Path(path).name.startswith(".")}  # of writing when it was killed
    names = ("frozen_probe", "head", "lora", "a%2Fb%20adapter", "pca_logreg")
    assert left == {"training/run.json", "training/embedding.pt"} | {
        f"training/cell-{repeat}-0/{name}.finished.pt" for repeat in range(2) for name in names
    }


def fit(adata, checkpoint, folder, *, resume=True, **options):
    runner = sk.AnnotationRunner(checkpoint=checkpoint, **{"strategies": ("frozen_probe", "head"), **options})
    runner.fit_compare(adata, output_dir=folder, resume=resume)
    return runner


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))


def test_the_same_call_again_computes_nothing(blood, checkpoint, tmp_path, monkeypatch, no_training):
    monkeypatch.undo()
    first = fit(blood, checkpoint, tmp_path)
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("scdlkit._reader.embed_tokens", lambda *_, **__: pytest.fail("embedded"))
    order = np.random.default_rng(0).permutation(blood.n_obs)
    second = fit(blood[order].copy(), checkpoint, tmp_path)  # the order of the cells is not part of a run
    pd.testing.assert_frame_equal(second.results_, first.results_)
    pd.testing.assert_frame_equal(second.history_, first.history_)
    for name in ("frozen_probe", "head", "pca_logreg"):
        one, two = (runner.predict(blood, strategy=name)["probabilities"] for runner in (first, second))
        np.testing.assert_array_equal(one, two)


def test_strategies_and_repeats_may_be_added(blood, checkpoint, tmp_path, monkeypatch):
    quick = {"head": HeadConfig(training=TrainingConfig(max_epochs=2))}
    fit(blood, checkpoint, tmp_path, strategies=("frozen_probe",), baselines=())
    trained = []
    monkeypatch.setattr(
        Trainer, "train", lambda self, strategy, *a, **k: (trained.append(k["seed"]), TRAIN(self, strategy, *a, **k))[1]
    )
    more = {"strategies": ("frozen_probe", "head"), "strategy_configs": quick, "n_repeats": 2, "baselines": ()}
    added = fit(blood, checkpoint, tmp_path, **more)
    assert len(set(trained)) == 2 and (added.results_["n_fits"] == 2).all()
    alone = sk.AnnotationRunner(checkpoint=checkpoint, **more)
    alone.fit_compare(blood)
    columns = [c for c in alone.folds_ if c not in COSTS]
    pd.testing.assert_frame_equal(added.folds_[columns], alone.folds_[columns])


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"random_state": 1}, None, "different random_state, tokens"),
        ({"val_size": 0.2}, None, "different val_size"),
        ({"group_key": "donor"}, None, "different groups"),
        ({"max_length": 50}, None, "different tokens"),
        ({"strategy_configs": {"frozen_probe": FrozenProbeConfig(C=1.0)}}, None, "'frozen_probe': different config"),
        ({}, lambda adata: adata[:200].copy(), "different cells, labels"),
        ({}, lambda adata: ad.AnnData(adata.X, obs=adata.obs.assign(cell_type=list("ab" * 120)), var=adata.var), "labels"),
    ],
)  # fmt: skip
def test_another_call_on_the_same_folder_is_an_error(
    blood, checkpoint, tmp_path, no_training, options, change, message
):
    first = {"strategies": ("frozen_probe",), "baselines": ()}
    fit(blood, checkpoint, tmp_path, **first)
    state = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    changed = blood if change is None else change(blood.copy())
    with pytest.raises(ValueError, match=f"run.json is from another .*{message}.*start over with resume=False"):
        fit(changed, checkpoint, tmp_path, **first | options)
    assert state == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    if "max_length" in options:
        fit(changed, checkpoint, tmp_path, resume=False, **first | options)


def test_resume_needs_a_folder(blood, checkpoint):
    with pytest.raises(ValueError, match="resume=True needs output_dir"):
        fit(blood, checkpoint, None)


# Ctrl-C


@pytest.fixture
def interrupted_in(monkeypatch):
    """Ctrl-C while a strategy is trained under a seed."""

    def set_up(name: str, times: int = 0) -> None:
        count = [0]

        def raising(self, strategy, *args, **settings):
            if strategy.name == name:
                if count[0] == times:
                    raise KeyboardInterrupt
                count[0] += 1
            return TRAIN(self, strategy, *args, **settings)

        monkeypatch.setattr(Trainer, "train", raising)

    return set_up


QUICK = {"strategy_configs": {name: HeadConfig(training=TrainingConfig(max_epochs=2)) for name in ("head", "other")}}
THREE = {"strategies": ("frozen_probe", "head", "other"), "baselines": (), **QUICK}


def test_ctrl_c_leaves_a_usable_runner(blood, checkpoint, tmp_path, interrupted_in):
    interrupted_in("head")
    adata = blood.copy()
    with pytest.warns(UserWarning, match="Interrupted: head, other not finished .* same call with resume=True goes on"):
        runner = sk.tl.adapt_annotation(adata, checkpoint=checkpoint, output_dir=tmp_path, **THREE)
    assert runner.best_strategy_ == "frozen_probe" and runner.interrupted_.startswith("Interrupted: head, other")
    table = sk.get.strategy_table(adata).set_index("strategy")
    assert table["error"].to_dict() == {
        "frozen_probe": "",
        "head": "KeyboardInterrupt: not finished",
        "other": "KeyboardInterrupt: not finished",
    }
    assert adata.uns["scgpt"]["params"]["interrupted"] == runner.interrupted_
    assert "**Interrupted: head, other not finished" in (tmp_path / "report.md").read_text()
    loaded = sk.AnnotationRunner.load(tmp_path / "model")
    assert loaded.interrupted_ == runner.interrupted_
    np.testing.assert_array_equal(loaded.predict(blood)["labels"], runner.predict(blood)["labels"])


def test_ctrl_c_then_resume(blood, checkpoint, tmp_path, interrupted_in, monkeypatch):
    interrupted_in("other")
    with pytest.warns(UserWarning, match="Interrupted: other not finished"):
        fit(blood, checkpoint, tmp_path, **THREE)
    monkeypatch.undo()
    sk.settings.device = "cpu"
    resumed = fit(blood, checkpoint, tmp_path, **THREE)
    assert resumed.interrupted_ == "" and (resumed.results_["error"] == "").all()


def test_ctrl_c_in_a_later_fit_keeps_those_that_are_complete(blood, checkpoint, interrupted_in):
    interrupted_in("other", times=2)
    with pytest.warns(UserWarning, match=r"results are those of 2 of 3 fits\. A call with output_dir keeps"):
        runner = fit(blood, checkpoint, None, resume=False, n_repeats=3, **THREE)
    assert (runner.results_["n_fits"] == 2).all() and (runner.results_["error"] == "").all()
    assert runner.folds_["repeat"].tolist() == [0, 0, 0, 1, 1, 1]
    plain = sk.AnnotationRunner(checkpoint=checkpoint, n_repeats=2, **THREE)
    interrupted_in("nobody")
    plain.fit_compare(blood)
    metrics = [c for c in plain.results_ if c.startswith(("val_", "test_"))]
    pd.testing.assert_frame_equal(
        runner.results_.set_index("strategy")[metrics].sort_index(),
        plain.results_.set_index("strategy")[metrics].sort_index(),
    )


def test_ctrl_c_before_anything_is_finished(blood, checkpoint, interrupted_in, caplog):
    interrupted_in("head")
    runner = sk.AnnotationRunner(checkpoint=checkpoint, strategies=("head",), baselines=())
    with pytest.raises(KeyboardInterrupt):
        runner.fit_compare(blood)
    assert "Interrupted, nothing is compared. A call with output_dir keeps what it has done" in caplog.text
    with pytest.raises(RuntimeError, match="call fit_compare first"):
        runner.predict(blood)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_a_real_interrupt(tmp_path):
    command = [sys.executable, SCRIPT, "interrupt", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            state = tmp_path / "training" / "cell-0-0" / "a%2Fb%20adapter.training.pt"
            deadline = time.monotonic() + 300
            while not state.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=200)[1]
        finally:
            process.kill()  # it would go on for ever
    assert process.returncode == 0, error
    assert "Interrupted: a/b adapter, head not finished" in error
    assert json.loads((tmp_path / "labels.json").read_text())[0] == "frozen_probe"
    table = pd.read_csv(tmp_path / "results.csv").set_index("strategy")
    assert table.loc["head", "error"] == "KeyboardInterrupt: not finished" and table.loc["frozen_probe", "rank"] == 1


# Several processes


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of PyTorch has no gloo, over which processes on CPUs talk",
)
def test_two_processes_give_the_table_of_one(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, SCRIPT, "launch", str(tmp_path)], capture_output=True, text=True, timeout=1200, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    first, second = (np.load(tmp_path / f"labels-{rank}.npz", allow_pickle=True) for rank in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    runpy.run_path(SCRIPT)["alone"](tmp_path)
    together, alone = tables(tmp_path, "together"), tables(tmp_path, "alone")
    for name in ("results_.csv", "per_class_.csv"):
        by = ["strategy", "split", "class"] if "per_class" in name else ["strategy"]
        one, two = (table.set_index(by).sort_index().select_dtypes("number") for table in (alone[name], together[name]))
        pd.testing.assert_frame_equal(one, two, atol=0.08)  # 22 cells in a part: one cell may go either way
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "together"))
    for name in one:  # every cell once, in order
        np.testing.assert_allclose(one[name], two[name], atol=0.02)
    names = {path.name for path in (tmp_path / "adapted").iterdir()}
    assert {"strategy_metrics.csv", "report.md", "model", "training"} <= names
    assert result.stderr.count("Model, metrics, report and figures") == 1
    assert not list(tmp_path.rglob("*.part"))


def test_a_wrong_launch_is_an_error_before_any_work(blood, checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    runner = sk.AnnotationRunner(checkpoint=checkpoint)
    monkeypatch.setattr(runner, "_prepare", lambda _: pytest.fail("went on"))
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2 but RANK is not set"):
        runner.fit_compare(blood)
