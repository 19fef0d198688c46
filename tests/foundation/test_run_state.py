from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from scdlkit.foundation._run_state import Finished, RunState
from scdlkit.foundation._training_state import StateError
from scdlkit.foundation.strategies import FrozenProbe, Head, HeadConfig

CPU = torch.device("cpu")
RUN = {"seed": 1, "classes": ["B", "T"], "cells": "abc"}


def opened(folder, *, resume: bool = True, strategies=(Head(), FrozenProbe()), **changes) -> RunState:
    state = RunState(folder / "training", resume=resume, device=CPU)
    state.open(RUN | changes, strategies)
    return state


def finished(**changes) -> Finished:
    values = {
        "state": {"a": torch.arange(3.0)},
        "metadata": {"n_classes": 2, "n_trainable": 3},
        "history": [{"epoch": 1, "train_loss": float("nan")}],
        "fit_seconds": 1.5,
        "peak_memory_mb": 2.5,
        "probabilities": {"val": np.eye(2, dtype=np.float32), "test": np.empty((0, 2), np.float32)},
    }
    return Finished(**{**values, **changes})


def test_finished_strategies_come_back(tmp_path):
    fit = opened(tmp_path).fit("cell", 0, 1)
    assert fit.read("NK/T", {"seed": 1}) is None
    fit.folder.mkdir()
    (fit.folder / "%4E%4B%2F%54.training.pt").touch()
    fit.write("NK/T", {"seed": 1}, finished())
    assert [path.name for path in fit.folder.iterdir()] == ["%4E%4B%2F%54.finished.pt"]
    again = opened(tmp_path).fit("cell", 0, 1).read("NK/T", {"seed": 1})
    assert torch.equal(again.state["a"], torch.arange(3.0))
    np.testing.assert_equal(again[1:], finished()[1:])
    with pytest.raises(StateError, match="finished.pt is from another run of 'NK/T': different seed"):
        fit.read("NK/T", {"seed": 2})
    assert opened(tmp_path).fit("cell", 1, 1).read("NK/T", {"seed": 1}) is None


def test_embedding_comes_back(tmp_path):
    state = opened(tmp_path)
    assert state.read_embedding() is None
    keys = np.array([2**63 + 5, 3, 2**64 - 1], dtype=np.uint64)
    embedding = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    state.write_embedding(keys, embedding, 2.5)
    known, seconds = opened(tmp_path).read_embedding()
    assert seconds == 2.5
    np.testing.assert_array_equal(known.embedding_of(keys[::-1]), embedding[::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "run.json is from another run: different seed"),
        ({"classes": ["B", "C"], "new": 1}, "run: different classes, new"),
        ({"strategies": (Head(HeadConfig(n_layers=2)),)}, "from another 'head': different config"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, changes, message):
    opened(tmp_path).fit("cell").write("head", {}, finished())
    with pytest.raises(StateError, match=message):
        opened(tmp_path, **changes)
    assert opened(tmp_path).fit("cell").read("head", {}) is not None


def test_strategies_may_be_added(tmp_path):
    opened(tmp_path, strategies=(Head(),)).fit("cell").write("head", {}, finished())
    opened(tmp_path, strategies=(FrozenProbe(),))
    assert opened(tmp_path).fit("cell").read("head", {}) is not None
    assert set(json.loads((tmp_path / "training" / "run.json").read_text())["strategies"]) == {"head", "frozen_probe"}


def test_without_resume_it_starts_over(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "scdlkit"):
        opened(tmp_path).fit("cell").write("head", {}, finished())
        assert opened(tmp_path, resume=False, seed=7).fit("cell").read("head", {}) is None
    assert "starts from the beginning" in caplog.messages[0] and "is removed" in caplog.messages[1]
    assert [path.name for path in tmp_path.iterdir()] == ["training"]
    opened(tmp_path, seed=7)


def test_what_is_no_state_is_left_alone(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "thesis.txt").touch()
    for resume in (True, False):
        with pytest.raises(StateError, match="holds files but no run.json"):
            opened(tmp_path, resume=resume)
    assert (tmp_path / "training" / "thesis.txt").exists()
