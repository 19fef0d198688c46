"""Several processes give the result of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scdlkit.foundation._device import resolve_device
from scdlkit.foundation._processes import Processes, join, processes
from scdlkit.foundation.bundle import write_bundle

CPU = torch.device("cpu")


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of PyTorch has no gloo, over which processes on CPUs talk",
)
def test_two_processes_train_predict_and_embed_as_one(fits, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name("fits.py")), "launch", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SCDLKIT_DEVICE": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    source = fits.Source(dropout=0.0)
    train, val = fits.cells(65, source), fits.cells(31, source, seed=1)
    alone = fits.fit(train, val, source)
    first, second = (dict(np.load(tmp_path / f"launch-{rank}.npz")) for rank in range(2))
    history = [[row["train_loss"], row["val_loss"], row["val_macro_f1"]] for row in alone.history]
    np.testing.assert_allclose(first["history"], history, atol=1e-4)
    np.testing.assert_allclose(first["proba"], alone.predict_proba(val), atol=1e-3)
    np.testing.assert_allclose(first["latent"], alone.latent(val), atol=1e-3)
    np.testing.assert_allclose(first["embedding"], val.embedding, atol=1e-5)
    for name in first:  # all processes have the whole result
        np.testing.assert_array_equal(first[name], second[name])
    np.testing.assert_array_equal(first["again"], first["proba"])  # from the saved state
    assert {path.name for path in tmp_path.glob("wrote-*")} == {"wrote-0"}
    assert result.stderr.count("goes on after epoch") == 1 and "step/s" in result.stderr


def test_a_wrong_launch_is_an_error(monkeypatch):
    assert join(CPU).num_processes == 1
    assert processes(CPU) == Processes(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2 but RANK is not set.*torchrun --nproc-per-node 2"):
        processes(CPU)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        RuntimeError, match=r"2 processes were launched .*, but this one sees 1: each would train alone"
    ):
        processes(CPU)


def test_the_first_process_alone_writes_bundles(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert write_bundle(tmp_path / "model", {}, {"a": torch.zeros(1)}) == tmp_path / "model"
        assert (tmp_path / "model").exists() == (rank == "0")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
