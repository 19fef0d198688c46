"""What only a CUDA device can show; see test_overlap.py for the host's side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scdlkit.foundation._fit import Fit
from scdlkit.foundation.batching import collate
from scdlkit.foundation.frozen_cuda import can_run_packed
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.strategies import (
    AdapterConfig,
    BitFitConfig,
    CellData,
    FullFinetuneConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    TrainingConfig,
    get_strategy,
)
from scdlkit.foundation.training import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def data(fits):
    source = fits.Source(dropout=0.0)
    return fits.cells(300, source), fits.cells(60, source, seed=1), source


def embed(source, cells: CellData, device: str, **options) -> np.ndarray:
    ids = {"cls_id": source.cls_id, "pad_id": source.pad_id}
    return embed_tokens(source.encoder(), cells.tokens, **ids, device=device, progress=False, **options)


def test_many_small_batches_in_flight_give_what_the_cpu_gives(data):
    cells, _, source = data
    expected = embed(source, cells, "cpu")
    for budget in (100, 1000):
        found = embed(source, cells, "cuda", max_batch_tokens=budget, precision="fp32")
        np.testing.assert_allclose(found, expected, atol=1e-4)
    half = embed(source, cells, "cuda", max_batch_tokens=100, precision="bf16")
    assert 1e-6 < np.abs(half - expected).max() < 0.1


def test_batches_are_pinned(data):
    cells, _, source = data
    special = {"cls_id": source.cls_id, "pad_id": source.pad_id, "pad_value": -2}
    batch = collate(cells.tokens, **special, device=torch.device("cuda"))
    assert all(part.is_pinned() for part in batch)
    for one, other in zip(batch.to(torch.device("cuda")), collate(cells.tokens, **special), strict=True):
        assert one.is_cuda and torch.equal(one.cpu(), other)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [AdapterConfig, FullFinetuneConfig])
def test_training_gives_what_the_cpu_gives(data, fits, kind, compiled):
    train, val, source = data
    found = []
    for device in ("cpu", "cuda"):
        training = TrainingConfig(
            learning_rate=1e-3, batch_size=16, max_epochs=2, precision="fp32", compile=compiled and device == "cuda"
        )
        strategy = get_strategy(kind.strategy)(kind(training=training))
        strategy.source, strategy.precision = source, "fp32"
        strategy.fit(train, val, n_classes=3, seed=1, device=device, trainer=Trainer(progress=False))
        found.append((strategy.predict_proba(val), strategy.latent(val)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


def gradients(kind, cells: CellData, source, device: str, precision: str, checkpointing: bool = False, **options):
    """Mean loss of the first cells, and its gradients."""
    training = TrainingConfig(precision=precision, gradient_checkpointing=checkpointing)
    strategy = get_strategy(kind.strategy)(kind(training=training, **options))
    strategy.source, strategy._rows = source, cells.tokens.genes()
    strategy.build(cells, n_classes=3, seed=1)
    fit = Fit(strategy, cells, class_weights=np.ones(3, np.float32), seed=1, device=torch.device(device))
    fit.module.train()
    loss = float(fit.gradients(np.arange(64)))
    named = fit.module.named_parameters()
    return loss, {name: value.grad.cpu().double() for name, value in named if value.grad is not None}


KINDS = [FullFinetuneConfig, LoRAConfig, AdapterConfig, IA3Config, BitFitConfig, PrefixTuningConfig]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_half_precision(data, kind):
    """As near to those in single precision as a CPU's are."""
    train, _, source = data
    _, exact = gradients(kind, train, source, "cpu", "fp32")
    errors = []
    for device, checkpointing in (("cpu", False), ("cuda", False), ("cuda", True)):
        _, half = gradients(kind, train, source, device, "bf16", checkpointing)
        assert exact.keys() == half.keys()
        errors.append(float(torch.sqrt(sum((half[name] - exact[name]).square().sum() for name in exact))))
    assert 0 < max(errors[1:]) < 2.5 * errors[0]


@pytest.mark.parametrize("kind", [LoRAConfig, PrefixTuningConfig])
def test_gradients_from_kept_states(data, kind, tmp_path):
    """Of cells without padding, and for prefixes with it, where they were computed."""
    train, _, source = data
    wanted = {"kind": kind, "source": source, "layers": "last:1"}
    _, exact = gradients(cells=train, device="cpu", precision="fp32", **wanted)
    errors = []
    for device in ("cpu", "cuda"):
        states = LowerStates(train.tokens, source, torch.device(device), tmp_path)
        _, half = gradients(cells=replace(train, states=states.rows), device=device, precision="bf16", **wanted)
        assert exact.keys() == half.keys()
        errors.append(float(torch.sqrt(sum((half[name] - exact[name]).square().sum() for name in exact))))
    assert 0 < errors[1] < 2.5 * errors[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's reasons against every other kernel
def test_cells_of_any_length_reach_flash_attention(data):
    cells, _, source = data
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where another kernel would be needed
        for rows in (np.arange(cells.n_cells), np.flatnonzero(cells.tokens.lengths == cells.tokens.lengths[0])):
            embed(source, cells.subset(rows), "cuda", precision="bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("alike", [False, True])
def test_packed_cells_in_half_precision(data, precision, alike):
    cells, _, source = data
    tokens = cells.tokens
    if alike:
        tokens = tokens[np.flatnonzero(tokens.lengths == np.bincount(tokens.lengths).argmax())]
    encoder = source.encoder().to("cuda")
    assert can_run_packed(encoder, precision)
    ids = {"cls_id": source.cls_id, "pad_id": source.pad_id}
    exact = embed_tokens(source.encoder(), tokens, **ids, device="cpu", progress=False)
    found = embed_tokens(encoder, tokens, **ids, device="cuda", precision=precision, progress=False)
    steps = {"bf16": 2**8, "fp16": 2**11}[precision]
    error = np.abs(found - exact).max()
    assert 0 < error < 20 * np.abs(exact).max() / steps


def test_layer_norm_in_one_pass():
    triton_norm = pytest.importorskip("scdlkit.foundation._layer_norm_triton")
    generator = torch.Generator("cuda").manual_seed(0)
    for n_rows, width in ((1, 8), (7, 96), (1001, 512), (5, 513)):
        x = 3 + torch.randn(n_rows, width, device="cuda", dtype=torch.float16, generator=generator)
        weight, bias = torch.randn(2, width, device="cuda", generator=generator)
        expected = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
        found = triton_norm.layer_norm_(x.clone(), weight, bias, 1e-5)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
