"""A step gives the same result however it is computed."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from scdlkit.foundation import _device, _fit
from scdlkit.foundation._adamw import AdamW
from scdlkit.foundation._device import autocast_dtype
from scdlkit.foundation._overlap import prepared
from scdlkit.foundation.strategies import HeadConfig, TrainingConfig, _encoder, get_strategy
from scdlkit.foundation.training import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(fits):
    """Data without dropout, and a fit of it."""
    source = fits.Source(dropout=0.0)
    data = fits.cells(64, source), fits.cells(30, source, seed=1), source
    return data, fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced")


def same(first, second, val, atol=1e-4) -> None:
    np.testing.assert_allclose(first.predict_proba(val), second.predict_proba(val), atol=atol)
    np.testing.assert_allclose(
        [row["train_loss"] for row in first.history], [row["train_loss"] for row in second.history], atol=atol
    )


@pytest.mark.parametrize("how", ["accumulation", "tokens", "checkpointing"])
def test_pieces_and_checkpointing_change_nothing(fits, plain, how, monkeypatch):
    data, whole = plain
    settings = {"accumulation": {"accumulation": 5}, "checkpointing": {"gradient_checkpointing": True}}.get(how, {})
    if how == "tokens":
        monkeypatch.setitem(_fit.token_budget.__globals__["MAX_TRAINING_TOKENS"], "cpu", 130)
    calls = []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda *args: (calls.append(args[1].shape), forward(*args))[1])
    other = fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced", **settings)
    if how == "tokens":
        assert all(16 > cells and cells * length <= 130 for cells, length in calls[:6])
    else:
        assert max(calls[:4])[0] == {"accumulation": 4, "checkpointing": 16}[how]
    same(other, whole, data[1])


def test_cells_prepared_ahead_by_a_thread_change_nothing(fits, monkeypatch):
    """As on a GPU, whose results come behind besides."""
    source = fits.Source(dropout=0.2)
    data = fits.cells(64, source), fits.cells(30, source, seed=1), source
    plain = fits.fit(*data, max_epochs=2)
    threads = []

    @contextmanager
    def ahead(items, _):
        noted = (threads.append(threading.current_thread().name) or item for item in items)
        with prepared(noted, torch.device("cuda")) as ready:
            yield ready

    for module in (_fit, _encoder):
        monkeypatch.setattr(module, "prepared", ahead)
    other = fits.fit(*data, max_epochs=2)
    assert other.history == plain.history
    np.testing.assert_array_equal(other.latent(data[1]), plain.latent(data[1]))
    assert len(threads) >= 2 * 4 and all(name.startswith("scdlkit-prefetch") for name in threads)


def late(results):
    """Losses as those of a GPU, two steps behind."""
    waiting = deque()
    for key, value in results:
        waiting.append((key, value.detach().clone().numpy()))
        if len(waiting) > 2:
            yield waiting.popleft()
    yield from waiting


def test_losses_that_come_later_change_nothing(fits, plain, monkeypatch):
    data, whole = plain
    monkeypatch.setattr(_fit, "on_host", late)
    other = fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced")
    assert other.history == whole.history
    np.testing.assert_array_equal(other.latent(data[1]), whole.latent(data[1]))
    compute, steps = _fit.Fit._gradients, []

    def broken(self, own, parts, share):
        value = compute(self, own, parts, share)
        steps.append(own.n_cells)
        return value * math.nan if len(steps) == 2 else value

    monkeypatch.setattr(_fit.Fit, "_gradients", broken)
    with pytest.raises(FloatingPointError, match=r"loss of 'adapter' is nan at epoch 1, step 2 \(batch of 16 "):
        fits.fit(*data, max_epochs=3)
    assert len(steps) == 4  # not before it has come


def test_half_precision_is_for_what_trains_inside_the_encoder(fits, plain, monkeypatch):
    asked = []
    monkeypatch.setattr(_fit, "autocast_dtype", lambda precision, device: asked.append(precision))
    (train, val, source), _ = plain
    fits.fit(train, val, source, max_epochs=1)
    assert asked == ["auto"]
    for precision, expected in (("auto", "fp32"), ("bf16", "bf16")):
        head = get_strategy("head")(HeadConfig(training=TrainingConfig(max_epochs=1, precision=precision)))
        head.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=Trainer(progress=False))
        assert asked.pop() == expected


def test_checkpointing_repeats_dropout_exactly(fits):
    source = fits.Source(dropout=0.3)
    data = fits.cells(40, source), fits.cells(20, source, seed=1), source
    first, second = (fits.fit(*data, max_epochs=2, gradient_checkpointing=on) for on in (False, True))
    same(first, second, data[1], atol=1e-6)


def test_too_little_gpu_memory_halves_the_pieces(fits, plain, monkeypatch, caplog):
    data, whole = plain
    compute, sizes = _fit.Fit._gradients, []

    def small_gpu(self, own, parts, share):
        sizes.append(len(parts[0]))
        if len(parts[0]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return compute(self, own, parts, share)

    monkeypatch.setattr(_fit.Fit, "_gradients", small_gpu)
    with caplog.at_level(logging.WARNING, "scdlkit"):
        other = fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced")
    assert sizes[:3] == [16, 8, 4] and max(sizes[3:]) == 4
    assert caplog.messages == [
        "adapter: the GPU has not enough memory for 16 cells at once; goes on with 8 at once and 2 pieces a step.",
        "adapter: the GPU has not enough memory for 8 cells at once; goes on with 4 at once and 4 pieces a step.",
    ]
    same(other, whole, data[1])


def test_no_memory_for_a_single_cell_is_an_error(fits, plain, monkeypatch):
    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_fit.Fit, "_gradients", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError) as error:
        fits.fit(*plain[0], max_epochs=1)
    assert "gradient_checkpointing" in error.value.__notes__[0]


def test_bf16_is_close_and_leaves_float32(fits, plain):
    data, whole = plain
    mixed = fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced", precision="bf16")
    assert all(value.dtype == torch.float32 for value in mixed.trained_module().parameters())
    np.testing.assert_allclose(mixed.history[0]["train_loss"], whole.history[0]["train_loss"], rtol=0.02)
    assert mixed.history != whole.history
    same(
        fits.fit(*data, max_epochs=3, label_smoothing=0.1, class_weight="balanced", precision="auto"), whole, data[1], 0
    )


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_instructions_for_it_is_said_once(monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    _device._warn_if_slow.cache_clear()
    for _ in range(2):
        assert autocast_dtype("bf16", CPU) is torch.bfloat16
        assert _device.embedding_precision("int8", CPU) == "int8"
    assert caplog.text.count("no instructions for bfloat16; precision='fp32' will be faster") == (not supported)
    assert caplog.text.count("bfloat16, in which int8 computes as well; precision=") == (not supported)
    _device._warn_if_slow.cache_clear()


def test_precision_the_device_does_not_have():
    assert autocast_dtype("auto", CPU) is autocast_dtype("fp32", CPU) is None
    with pytest.raises(ValueError, match="precision='fp16' is not there on device 'cpu'"):
        autocast_dtype("fp16", CPU)
    with pytest.raises(ValueError, match="precision='bf16' is not there on device 'mps'"):
        autocast_dtype("bf16", torch.device("mps"))


def test_learning_rate_over_the_steps(fits, plain, monkeypatch):
    seen = []
    step = AdamW.step
    monkeypatch.setattr(
        AdamW, "step", lambda self, *args: (seen.append(self.param_groups[0]["lr"]), step(self, *args))[1]
    )
    fits.fit(*plain[0], max_epochs=5, patience=5, warmup=0.2, learning_rate=0.01)  # 4 steps an epoch
    expected = [0.0025, 0.005, 0.0075, 0.01] + [0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    np.testing.assert_allclose(seen, expected)
    config = TrainingConfig(schedule="constant", warmup=0.0)
    assert [config.learning_rate_at(step, 10) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("fused", [True, False])
def test_the_optimizer_is_the_one_of_pytorch(fused):
    """Weights and state, over groups that differ, a rate that changes, and a state that is taken over half-way."""

    def train(kinds: list[type[torch.optim.AdamW]]) -> tuple[list[torch.Tensor], dict]:
        draws = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(7, 5, generator=draws)) for _ in range(3)]
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "lr": 0.02}]
        state = None
        for kind in kinds:
            optimizer = kind([dict(group) for group in groups], lr=0.01, fused=fused)
            if state is not None:
                optimizer.load_state_dict(state)
            for _ in range(4):
                optimizer.zero_grad()
                for weight in weights:
                    weight.grad = torch.randn(7, 5, generator=draws)
                optimizer.param_groups[0]["lr"] *= 0.9
                optimizer.step()
            state = optimizer.state_dict()
        return weights, state

    expected, expected_state = train([torch.optim.AdamW, torch.optim.AdamW])
    for kinds in ([AdamW, AdamW], [AdamW, torch.optim.AdamW]):
        found, state = train(kinds)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert state["param_groups"] == expected_state["param_groups"]
        for number, values in expected_state["state"].items():
            assert all(torch.equal(state["state"][number][name], value) for name, value in values.items())


def test_label_smoothing_in_the_loss(fits, plain):
    """The first loss of a single step on all cells, against the definition."""
    (train, val, source), _ = plain
    strategy = fits.fit(train, val, source, max_epochs=1, batch_size=64, label_smoothing=0.3)
    fresh = fits.build(source)
    fresh._rows = strategy.encoder.token_ids
    fresh.build(train, n_classes=3, seed=1)
    log = np.log(fresh.probabilities(train, 3).astype(np.float64))
    target = 0.7 * np.eye(3)[train.codes] + 0.1
    assert strategy.history[0]["train_loss"] == pytest.approx(-(target * log).sum(1).mean(), rel=1e-5)


def test_preflight_changes_nothing(fits, plain, monkeypatch):
    from scdlkit.foundation import training

    data, _ = plain
    runs = []
    for least in (0, 10**6):
        monkeypatch.setattr(training, "_PREFLIGHT_STEPS", least)
        runs.append(fits.fit(*data, Trainer(progress=False), max_epochs=2))
    assert runs[0].history == runs[1].history
