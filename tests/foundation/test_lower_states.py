from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scdlkit as sk
from scdlkit.foundation import inference, lower_states
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.model import keys_to_keep
from scdlkit.foundation.strategies import (
    AdapterConfig,
    BitFitConfig,
    CellData,
    FullFinetuneConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    TrainingConfig,
    build_strategies,
)
from scdlkit.foundation.training import Trainer

CPU = torch.device("cpu")
HALF = {"rtol": 2e-3, "atol": 2e-3}  # float16 has 11 bits


@pytest.fixture(scope="module")
def source(fits):
    return fits.Source(dropout=0.3)


@pytest.fixture(scope="module")
def cells(fits, source):
    return fits.cells(40, source)


@pytest.fixture
def states(cells, source, tmp_path):
    return LowerStates(cells.tokens, source, CPU, tmp_path)


@pytest.fixture
def failing(monkeypatch):
    """From when it is called, no states can be computed."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    return lambda: monkeypatch.setattr(lower_states, "lower_states", fail)


def by_hand(source, tokens, n_blocks: int) -> list[torch.Tensor]:
    """Each cell by itself through the lowest blocks."""
    encoder = source.encoder().eval()
    result = []
    with torch.no_grad():
        for genes, bins in zip(
            np.split(tokens.gene_ids, tokens.indptr[1:-1]), np.split(tokens.bins, tokens.indptr[1:-1]), strict=True
        ):
            ids = torch.from_numpy(np.append(source.cls_id, genes).astype(np.int64))[None]
            x = encoder.embed_inputs(
                ids, torch.from_numpy(np.append(encoder.config.pad_value, bins).astype(np.float32))[None]
            )
            for block in encoder.blocks[:n_blocks]:
                x = block(x, None)
            result.append(x[0])
    return result


@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("packed", [True, False])
def test_they_are_what_the_blocks_make_of_each_cell(states, source, cells, n_blocks, packed, monkeypatch):
    if not packed:  # as on a GPU
        monkeypatch.setattr(inference, "can_freeze", lambda encoder: False)
    rows = states.rows
    assert rows.kept(n_blocks) and rows.n_cells == 40
    padded, mask = rows.after(n_blocks)
    assert padded.dtype == torch.float16
    for expected, found, padding in zip(by_hand(source, cells.tokens, n_blocks), padded, mask, strict=True):
        assert padding.tolist() == [False] * len(expected) + [True] * (len(found) - len(expected))
        torch.testing.assert_close(found[~padding].float(), expected, **HALF)
        assert not found[padding].any()


def test_the_upper_blocks_go_on_from_them_to_the_embedding(states, source, cells):
    padded, mask = states.rows.after(1)
    encoder = source.encoder().eval()
    with torch.no_grad():
        embedding = encoder.encode(padded.float(), keys_to_keep(mask), cls_only=True, start=1)[:, 0]
    ids = {"cls_id": source.cls_id, "pad_id": source.pad_id}
    expected = embed_tokens(source.encoder(), cells.tokens, **ids, device="cpu", progress=False)
    torch.testing.assert_close(embedding, torch.from_numpy(expected), **HALF)


@pytest.fixture(scope="module")
def kept(cells, source, tmp_path_factory):
    states = LowerStates(cells.tokens, source, CPU, tmp_path_factory.mktemp("states"))
    whole, mask = states.rows.after(1)
    return states, [cell[~padding] for cell, padding in zip(whole, mask, strict=True)]


@settings(max_examples=50, deadline=None)
@given(index=st.lists(st.integers(0, 39), min_size=1, max_size=20), again=st.integers(0, 19))
def test_any_cells_in_any_order(kept, index, again):
    states, whole = kept
    rows = states.rows[np.array(index)][np.arange(len(index))]
    padded, mask = rows.after(1)
    for position, cell in enumerate(index):
        assert torch.equal(padded[position, : len(whole[cell])], whole[cell])
    lengths = [len(whole[cell]) for cell in index]
    assert padded.shape[1] == max(lengths)
    assert (mask is None) == (len(set(lengths)) == 1)
    assert rows[again % len(index)].n_cells == 1
    longer, covered = rows.after(1, multiple=16)
    assert longer.shape[1] == (max(lengths) if mask is None else -(-max(lengths) // 16) * 16)
    assert torch.equal(longer[:, : max(lengths)], padded) and not longer[:, max(lengths) :].any()
    assert mask is None or covered.sum(1).tolist() == [longer.shape[1] - length for length in lengths]
    part = rows.load(1)[again % len(index) :]  # is in memory too
    read, part._states = part.packed(1, usual=1, device=CPU), None
    assert torch.equal(read.states, torch.cat([whole[cell] for cell in index[again % len(index) :]]))
    together = rows.packed(1, usual=lengths[0], device=CPU)
    assert torch.equal(together.states, torch.cat([whole[cell] for cell in index]))
    assert together.cells.starts.tolist() == [0, *np.cumsum(lengths)]
    assert together.cells.longest == max(lengths) and together.cells.alike == (mask is None)


def test_computed_once_for_every_number_of_blocks(states, failing):
    first, _ = states.rows.after(1)
    second, _ = states.rows.after(2)
    assert not torch.equal(first, second)
    failing()
    assert torch.equal(states.rows.after(1)[0], first) and torch.equal(states.rows.after(2)[0], second)


def test_nothing_is_left(cells, source, tmp_path, fits):
    states = LowerStates(cells.tokens, source, CPU, tmp_path / "new")
    rows = states.rows[np.array([3, 4])]
    assert rows.kept(1) and not list((tmp_path / "new").iterdir())  # not even if the process is killed now
    descriptor = states.after(1).file.fileno()
    del states
    assert rows.after(1)[0].shape[0] == 2  # lives as long as a part of it
    del rows
    with pytest.raises(OSError):
        os.fstat(descriptor)


@pytest.mark.parametrize("free", [0, 1])
def test_a_disk_without_room(states, cells, monkeypatch, caplog, free):
    needed = 2 * 16 * int((cells.tokens.lengths + 1).sum())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * needed - 1 + free))
    with caplog.at_level(logging.INFO, "scdlkit"):
        assert states.rows.kept(1) == bool(free)
    assert ("every epoch computes it again" in caplog.text) != bool(free)
    if not free:
        with pytest.raises(RuntimeError, match="states after 1 blocks are not kept"):
            states.rows.after(1)


def test_a_disk_that_fails(states, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lower_states.RowFile, "write", fail)
    assert not states.rows.kept(1)
    assert "Every epoch computes what 1 frozen blocks make of these cells: [Errno 28] No space left" in caplog.text


def test_numbers_beyond_float16(states, monkeypatch, caplog):
    compute = inference.lower_states
    monkeypatch.setattr(
        lower_states, "lower_states", lambda *args, **kw: ((rows, 1e5 * x) for rows, x in compute(*args, **kw))
    )
    assert not states.rows.kept(1)
    assert "beyond float16" in caplog.text


def test_several_processes_compute_it_themselves(states, monkeypatch, failing):
    failing()
    monkeypatch.setattr(lower_states, "processes", lambda device: (None, 2))
    assert not states.rows.kept(1)


def test_the_next_comparison_finds_them(cells, source, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(sk.settings, "_cache_dir", tmp_path / "cache")
    monkeypatch.setattr(sk.settings, "_cache_embeddings", 1e-3)

    def states(tokens=cells.tokens, checkpoint="a"):
        return LowerStates(tokens, source, CPU, tmp_path, checkpoint_sha256=checkpoint).rows

    first, _ = states().after(1)
    (path,) = (tmp_path / "cache" / "embeddings").iterdir()
    failing()
    assert torch.equal(states().after(1)[0], first)
    for other in (states(checkpoint="b"), states(cells.tokens[:5]), states(checkpoint=None)):
        with pytest.raises(AssertionError, match="computed again"):
            other.after(1)
    with pytest.raises(AssertionError, match="computed again"):
        states().after(2)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match="computed again"):
        states().after(1)


def test_what_is_larger_than_the_cache_is_not_put_there(cells, source, tmp_path, monkeypatch):
    monkeypatch.setattr(sk.settings, "_cache_dir", tmp_path / "cache")
    monkeypatch.setattr(sk.settings, "_cache_embeddings", 1e-6)
    assert LowerStates(cells.tokens, source, CPU, tmp_path, checkpoint_sha256="a").rows.kept(1)
    assert not (tmp_path / "cache").exists()


# --- strategies that train the upper blocks alone ---


def build(source, config, **training):
    config = replace(config, training=TrainingConfig(batch_size=16, max_epochs=4, learning_rate=1e-2, **training))
    (strategy,) = build_strategies((config.strategy,), {config.strategy: config})
    strategy.source = source
    return strategy


def fit(strategy, train: CellData, val: CellData, trainer: Trainer | None = None):
    strategy.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=trainer or Trainer(progress=False))
    return strategy


@pytest.mark.parametrize(
    ("config", "n_frozen"),
    [
        (LoRAConfig(rank=2, layers="last:1"), 1),
        (IA3Config(layers="last:1"), 1),
        (AdapterConfig(bottleneck=4, layers="last:1"), 1),
        (PrefixTuningConfig(length=2, layers="last:1"), 1),
        (LoRAConfig(rank=2), 0),
        (BitFitConfig(), 0),
        (FullFinetuneConfig(), 0),
    ],
    ids=lambda value: getattr(value, "strategy", str(value)),
)
def test_how_many_blocks_are_frozen(source, cells, config, n_frozen):
    strategy = build(source, config)
    strategy._rows = cells.tokens.genes()
    strategy.build(cells, n_classes=3, seed=0)
    module = strategy.module
    assert module.n_frozen == n_frozen
    module.train()
    assert [block.training for block in module.encoder.blocks] == [n_frozen == 0, True]
    assert module.encoder.value_encoder.training == (n_frozen == 0)
    assert module.head.training


@pytest.mark.parametrize("config", [LoRAConfig(rank=2, layers="last:1"), PrefixTuningConfig(length=2, layers="last:1")])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_training_from_states_is_training_from_tokens(source, cells, fits, tmp_path, config, dtype, monkeypatch):
    val = fits.cells(30, source, seed=1)
    expected = fit(build(source, config), cells, val)
    asked = []
    batch = type(expected)._batch
    monkeypatch.setattr(type(expected), "_batch", lambda self, part: asked.append(part.n_cells) or batch(self, part))
    monkeypatch.setattr(lower_states, "_TYPE", dtype)
    train, kept = (replace(part, states=LowerStates(part.tokens, source, CPU, tmp_path).rows) for part in (cells, val))
    strategy = fit(build(source, config), train, kept)
    assert not asked  # no token was read
    # the little network, untrained, is sensitive to how its numbers are rounded
    difference = 1e-4 if dtype is np.float32 else 0.03
    for row, other in zip(strategy.history, expected.history, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=difference)
        assert row["val_loss"] == pytest.approx(other["val_loss"], abs=difference)
    # predictions are made without, as what is kept is rounded
    np.testing.assert_array_equal(strategy.predict_proba(kept), strategy.predict_proba(val))
    np.testing.assert_array_equal(strategy.latent(kept), strategy.latent(val))


def test_a_fit_that_was_cut_off_goes_on_exactly(source, cells, fits, tmp_path, monkeypatch):
    val = fits.cells(30, source, seed=1)
    config = LoRAConfig(rank=2, layers="last:1")

    def kept():
        return [replace(part, states=LowerStates(part.tokens, source, CPU, tmp_path).rows) for part in (cells, val)]

    whole = fit(build(source, config), *kept())
    cut = build(source, config)
    probabilities, calls = cut.probabilities, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return probabilities(*args)

    monkeypatch.setattr(cut, "probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, *kept(), Trainer(progress=False, state_dir=tmp_path / "state"))
    again = fit(build(source, config), *kept(), Trainer(progress=False, state_dir=tmp_path / "state", resume=True))
    assert len(again.history) == 4
    expected = whole.state_dict()
    assert all(value.equal(expected[name]) for name, value in again.state_dict().items())


def test_adapt_annotation_keeps_them(blood, checkpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sk.settings, "temp_dir", tmp_path)
    config = LoRAConfig(layers="last:1", training=TrainingConfig(max_epochs=2))
    options = {"strategies": ("lora",), "strategy_configs": {"lora": config}, "max_length": 60, "device": "cpu"}
    with caplog.at_level(logging.INFO, "scdlkit"):
        runner = sk.adapt_annotation(blood, label_key="cell_type", checkpoint=checkpoint, progress=False, **options)
    lines = [record.message for record in caplog.records if "frozen blocks make of" in record.message]
    assert len(lines) == 1 and "is kept in a file in" in lines[0] and str(tmp_path) in lines[0]
    assert not list(tmp_path.iterdir())
    assert runner.results_.loc[runner.results_["strategy"] == "lora", "error"].item() == ""
