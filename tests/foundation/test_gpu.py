"""What only a CUDA device can show; see test_overlap.py for the host's side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scdlkit.foundation import _graphs
from scdlkit.foundation._fit import Fit
from scdlkit.foundation._random import seeded
from scdlkit.foundation.batching import collate
from scdlkit.foundation.frozen_cuda import can_run_packed
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.strategies import (
    AdapterConfig,
    AnyPeftConfig,
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


def fit_in_half(kind, train: CellData, source, *, cuda_graphs: bool) -> Fit:
    """Before its first step."""
    config = TrainingConfig(precision="bf16", cuda_graphs=cuda_graphs, batch_size=16)
    options = {"dropout": 0.0} if kind is LoRAConfig else {}
    strategy = get_strategy(kind.strategy)(kind(training=config, **options))
    strategy.source, strategy._rows = source, train.tokens.genes()
    strategy.build(train, n_classes=3, seed=1)
    return Fit(strategy, train, class_weights=np.ones(3, np.float32), seed=1, device=torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_have_the_same_gradients(data, kind):
    """For cells of different length and of one, over and over, and for fewer cells after many."""
    train, _, source = data
    lengths = train.tokens.lengths
    alike = np.flatnonzero(lengths == lengths.max())[:8]
    steps = [*(np.arange(start, start + 16) for start in range(0, 96, 16)), alike, np.arange(7)] * 3
    plain, recorded = (fit_in_half(kind, train, source, cuda_graphs=graphs) for graphs in (False, True))
    for fit in (plain, recorded):
        fit.module.train()
    for rows in steps:
        losses, found = [], []
        for fit in (plain, recorded):
            losses.append(float(fit.gradients(rows)))
            found.append([value.grad.double() for value in fit.module.parameters() if value.requires_grad])
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        size = torch.sqrt(sum(one.square().sum() for one in found[0]))
        error = torch.sqrt(sum((one - other).square().sum() for one, other in zip(*found, strict=True)))
        assert error < 0.02 * size
    assert recorded.recorder.holds_memory and plain.recorder is None


def test_recorded_steps_draw_dropout_anew(data, fits):
    """As many numbers as steps do that are not recorded, so cells of one length lose the same by it."""
    train, _, _ = data
    source = fits.Source(dropout=0.3)
    lengths = train.tokens.lengths
    alike = np.flatnonzero(lengths == lengths.max())[:8]
    losses = []
    for graphs in (False, True):
        fit = fit_in_half(FullFinetuneConfig, train, source, cuda_graphs=graphs)
        fit.module.train()
        with seeded(3, device=fit.device):
            losses.append([float(fit.gradients(alike)) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert len({round(loss, 4) for loss in losses[1]}) == 5


@pytest.fixture
def replays(monkeypatch):
    """Grows with every step that a graph repeats."""
    found, record = [], _graphs.record

    def counted(*arguments):
        pool, replay, loss = record(*arguments)
        return pool, lambda: (found.append(1), replay()), loss

    monkeypatch.setattr(_graphs, "record", counted)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FullFinetuneConfig, {}),
        (FullFinetuneConfig, {"precision": "fp16"}),  # with scaled losses
        (FullFinetuneConfig, {"accumulation": 2}),
        (LoRAConfig, {}),
    ],
)
def test_recorded_fits_learn_the_same(data, replays, kind, options):
    train, val, source = data
    found = []
    for graphs in (False, True):
        assert not replays
        training = TrainingConfig(batch_size=16, max_epochs=5, learning_rate=1e-3, cuda_graphs=graphs, **options)
        strategy = get_strategy(kind.strategy)(kind(training=training))
        strategy.source = source
        strategy.fit(train, val, n_classes=3, seed=1, device="cuda", trainer=Trainer(progress=False))
        found.append(strategy.predict_proba(val))
    assert len(replays) > 50  # of 95 steps
    assert np.abs(found[0] - found[1]).max() < 0.1


def test_what_the_host_draws_is_not_repeated(data, replays, caplog):
    """peft's LoHa asks the host's generator in every step whether it passes a module over."""
    train, val, source = data
    training = TrainingConfig(batch_size=16, max_epochs=1)
    strategy = get_strategy("any_peft")(AnyPeftConfig(peft_type="LOHA", settings={"r": 2}, training=training))
    strategy.source = source
    with caplog.at_level("INFO", "scdlkit"):
        strategy.fit(train, val, n_classes=3, seed=1, device="cuda", trainer=Trainer(progress=False))
    assert "draws random numbers" in caplog.text and not replays


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
