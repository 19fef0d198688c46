"""What only a CUDA device can show; see test_overlap.py for the host's side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scdlkit.foundation.batching import collate
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.strategies import AdapterConfig, CellData, FullFinetuneConfig, TrainingConfig, get_strategy
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
            learning_rate=1e-3, batch_size=16, max_epochs=2, compile=compiled and device == "cuda"
        )
        strategy = get_strategy(kind.strategy)(kind(training=training))
        strategy.source = source
        strategy.fit(train, val, n_classes=3, seed=1, device=device, trainer=Trainer(progress=False))
        found.append((strategy.predict_proba(val), strategy.latent(val)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's reasons against every other kernel
def test_cells_of_one_length_alone_reach_flash_attention(data):
    cells, _, source = data
    alike = np.flatnonzero(cells.tokens.lengths == np.bincount(cells.tokens.lengths).argmax())
    assert len(alike) > 1
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where another kernel would be needed
        embed(source, cells.subset(alike), "cuda", precision="bf16")
        with pytest.raises(RuntimeError, match="No available kernel"):
            embed(source, cells, "cuda", precision="bf16")
