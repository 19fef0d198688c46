from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scdlkit.foundation import _preflight
from scdlkit.foundation._preflight import Estimate, pieces, preflight, token_budget

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 50), st.integers(1, 400))
def test_pieces_keep_the_cells_and_the_budget(lengths, at_least, max_tokens):
    lengths = np.array([*lengths, 99])
    rows = np.arange(len(lengths) - 1)[::-1]
    found = pieces(rows, lengths, at_least=at_least, max_tokens=max_tokens)
    np.testing.assert_array_equal(np.concatenate(found), rows)
    assert len(found) >= min(at_least, len(rows))
    assert all(len(part) == 1 or len(part) * lengths[part].max() <= max_tokens for part in found)
    assert len(pieces(rows, None, at_least=1, max_tokens=1)) == 1


def test_budget(monkeypatch):
    machine = SimpleNamespace(total=16 * 2**30)
    monkeypatch.setattr(_preflight.psutil, "virtual_memory", lambda: machine)
    most = _preflight.MAX_TRAINING_TOKENS["cpu"]
    assert token_budget(CPU, 0.0) == token_budget(CPU, 1000.0) == most
    assert token_budget(CPU, 320_000.0) == int(0.4 * 16 * 2**30 / 320_000) < most  # whole-human, on a laptop
    assert token_budget(CPU, 1e12) == 1


def test_preflight_tries_the_most_costly_step_and_logs_long_runs(caplog, monkeypatch):
    tried = []
    lengths = np.array([10, 10, 50, 20, 20, 20])
    batches = [np.array([0, 1]), np.array([2]), np.array([3, 4, 5])]
    monkeypatch.setattr(_preflight.time, "perf_counter", iter([0.0, 60.0, 0.0, 1.0]).__next__)
    arguments = {"n_trainable": 10**7, "max_epochs": 30, "device": CPU}
    with caplog.at_level(logging.INFO, "scdlkit"):
        found = preflight("lora", tried.append, batches, lengths, **arguments)
        assert found.step_seconds == 60
        assert found.epoch_seconds == pytest.approx(60 * (20 + 50 + 60) / 60)
        assert found.memory_mb >= 8 * 10**7 / 2**20
        preflight("quick", tried.append, batches, lengths, **arguments)
    assert tried[0].tolist() == [3, 4, 5]
    assert "lora: about 2 min an epoch (3 steps), at most 65 min for 30 epochs, and " in caplog.text
    assert "quick" not in caplog.text


def test_durations():
    text = Estimate(1, 90, 1234.5).text("x", 7, 100)
    assert text.startswith("x: about 90 s an epoch (7 steps), at most 2.5 h for 100 epochs, and 1,234 MB of memory")
