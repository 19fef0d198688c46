"""Training on cells that stand one behind the other gives what training on padded ones gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from scdlkit.foundation import _packed
from scdlkit.foundation.batching import PackedBatch, StateBatch, collate_packed
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.strategies import (
    AdapterConfig,
    BitFitConfig,
    FullFinetuneConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    TrainingConfig,
    _encoder,
    get_strategy,
)
from scdlkit.foundation.training import Trainer

CPU = torch.device("cpu")
UPPER = LoRAConfig(rank=2, dropout=0.0, layers="last:1")


@pytest.fixture(scope="module")
def source(fits):
    return fits.Source(dropout=0.0)


@pytest.fixture(autouse=True)
def _attention(monkeypatch, fits):
    monkeypatch.setattr(_packed, "_flash_kernel", lambda: fits.attend_by_cell)


def build(source, config, **training):
    training = TrainingConfig(batch_size=16, max_epochs=3, learning_rate=1e-2, **training)
    strategy = get_strategy(config.strategy)(replace(config, training=training))
    strategy.source = source
    return strategy


@pytest.mark.parametrize(
    "config",
    [
        FullFinetuneConfig(),
        BitFitConfig(),
        LoRAConfig(rank=2, dropout=0.0),
        IA3Config(),
        AdapterConfig(bottleneck=4),
        UPPER,
    ],
    ids=lambda config: f"{config.strategy}-{getattr(config, 'layers', None)}",
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_fit(source, fits, tmp_path, monkeypatch, config, checkpointing):
    train, val = fits.cells(60, source), fits.cells(30, source, seed=1)
    if config is UPPER:
        train, val = (
            replace(part, states=LowerStates(part.tokens, source, CPU, tmp_path).rows) for part in (train, val)
        )
    found, batches = [], []
    embed = _encoder.AdaptedEncoder.embed
    monkeypatch.setattr(
        _encoder.AdaptedEncoder, "embed", lambda self, batch: batches.append(batch) or embed(self, batch)
    )
    for packed in (False, True):
        monkeypatch.setattr(_encoder.EncoderStrategy, "_packs", lambda self, device, packed=packed: packed)
        batches.clear()
        strategy = build(source, config, gradient_checkpointing=checkpointing)
        strategy.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=Trainer(progress=False))
        kinds = {
            isinstance(batch, PackedBatch | StateBatch) and isinstance(batch.cells, _packed.Packed) for batch in batches
        }
        assert kinds == {packed}
        found.append((strategy.history, strategy.predict_proba(val), strategy.latent(val)))
    (history, *results), (expected_history, *expected) = found
    for row, other in zip(history, expected_history, strict=True):
        assert row == pytest.approx(other, abs=2e-3)
    for one, other in zip(results, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_where_cells_are(fits, source):
    tokens = fits.cells(30, source).tokens
    lengths = tokens.lengths
    batch = collate_packed(tokens, cls_id=source.cls_id, pad_value=-2, usual=int(lengths.max()))
    starts = batch.cells.starts.numpy()
    assert (np.diff(starts) == lengths + 1).all() and batch.cells.longest == lengths.max() + 1
    assert not batch.cells.alike
    for cell in range(30):
        inside = slice(tokens.indptr[cell], tokens.indptr[cell + 1])
        ids, bins = (part[starts[cell] : starts[cell + 1]].tolist() for part in (batch.gene_ids, batch.values))
        assert ids == [source.cls_id, *tokens.gene_ids[inside]] and bins == [-2, *tokens.bins[inside]]
    longest = tokens[np.flatnonzero(lengths == lengths.max())]
    for usual in (0, int(lengths.max())):
        alike = collate_packed(longest, cls_id=source.cls_id, pad_value=-2, usual=usual).cells.alike
        assert alike == (usual > 0)


def test_the_first_of_each_cell():
    cells = _packed.Packed(torch.tensor([0, 2, 3, 7], dtype=torch.int32), 4, alike=False)
    x = torch.arange(14.0).view(7, 2).requires_grad_()
    first = cells.first(x)
    assert first.tolist() == [[0, 1], [4, 5], [6, 7]]
    first.sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 1, 1, 0, 0, 0]


def test_what_packed_cells_do_not_have(source):
    block = source.encoder().blocks[0].train()
    cells = _packed.Packed(torch.tensor([0, 2, 3], dtype=torch.int32), 2, alike=False)
    x = torch.ones(3, 16)
    assert block(x, cells).shape == (3, 16)
    for name, value in (("prefix", torch.nn.Identity()), ("attention_dropout", 0.1)):
        changed = copy.deepcopy(block)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match="no attention dropout and no prefix"):
            changed(x, cells)


@pytest.mark.parametrize(
    ("config", "training", "half", "expected"),
    [
        (LoRAConfig(), {}, True, True),
        (LoRAConfig(), {}, False, False),  # the kernel knows half precision alone
        (PrefixTuningConfig(), {}, True, False),  # which has keys of its own
        (LoRAConfig(), {"attention_dropout": True}, True, False),  # which the kernel does not know
    ],
)
def test_when_it_is_done(fits, source, monkeypatch, config, training, half, expected):
    strategy, cells = build(source, config, **training), fits.cells(20, source)
    strategy._rows = cells.tokens.genes()
    strategy.build(cells, n_classes=3, seed=0)
    strategy.module.train()
    assert not strategy._packs(CPU)
    monkeypatch.setattr(_encoder, "can_attend", lambda device, head_width: head_width % 8 == 0)
    with torch.autocast("cpu", enabled=half):
        assert strategy._packs(CPU) == expected
        assert not isinstance(strategy._batch(cells), PackedBatch) != expected
        strategy.module.eval()
        assert strategy._packs(CPU) == (half and config.strategy != "prefix_tuning")
        strategy.encoder.blocks[0].compiled = lambda *_: None  # shapes that were not compiled for
        assert not strategy._packs(CPU)
