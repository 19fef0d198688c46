"""Steps that are recorded give the gradients of those that are not; a stand-in for CUDA graphs runs without a GPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scdlkit.foundation import _graphs, _packed
from scdlkit.foundation._fit import Fit
from scdlkit.foundation.batching import Batch, PackedBatch, packed_cells
from scdlkit.foundation.lower_states import LowerStates
from scdlkit.foundation.strategies import (
    AdapterConfig,
    AnyPeftConfig,
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


class Recordings:
    """In place of CUDA graphs: nothing is computed when one is recorded, and all of it in the same tensors when it starts."""

    def __init__(self) -> None:
        self.replays: list[int] = []  # of each
        self.available = 10**12

    def record(self, run, device, pool):
        assert pool == ("pool" if self.replays else None)
        number, loss = len(self.replays), torch.zeros(())
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            loss.copy_(run())

        return "pool", replay, loss


@pytest.fixture
def recordings(monkeypatch, fits):
    found = Recordings()
    monkeypatch.setattr(_graphs, "record", found.record)
    monkeypatch.setattr(_graphs, "available", lambda device: found.available)
    monkeypatch.setattr(_graphs, "_no_waiting", nullcontext)
    monkeypatch.setattr(_graphs, "_host_numbers", lambda: torch.zeros(1))  # on a CPU all numbers are the host's
    monkeypatch.setattr(_packed, "_flash_kernel", lambda: fits.attend_by_cell)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


def fit_of(monkeypatch, source, cells, config, *, records: bool, **training) -> Fit:
    monkeypatch.setattr(Fit, "_records", lambda self: records)
    settings = {"batch_size": 8, "learning_rate": 1e-2, "max_epochs": 4, **training}
    strategy = get_strategy(config.strategy)(replace(config, training=TrainingConfig(**settings)))
    strategy.source, strategy._rows = source, cells.tokens.genes()
    strategy.build(cells, n_classes=3, seed=1)
    return Fit(strategy, cells, class_weights=np.array([0.5, 1, 2], np.float32), seed=1, device=CPU)


def gradients(fit: Fit, rows: np.ndarray) -> dict[str, np.ndarray]:
    loss = float(fit.gradients(rows))
    named = fit.module.named_parameters()
    return {"loss": np.array(loss), **{name: value.grad.numpy().copy() for name, value in named if value.requires_grad}}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * max(1, np.abs(value).max()), err_msg=name)


PREFIX = "prefix_tuning"  # which needs padding
CONFIGS = [
    FullFinetuneConfig(),
    LoRAConfig(rank=2, dropout=0.0),
    AdapterConfig(bottleneck=4),
    IA3Config(),
    PrefixTuningConfig(),
    LoRAConfig(rank=2, dropout=0.0, layers="last:1"),
]


@pytest.mark.parametrize(
    ("config", "packed"),
    [(config, packed) for config in CONFIGS for packed in (False, True) if not (packed and config.strategy == PREFIX)],
    ids=lambda value: value if isinstance(value, bool) else f"{value.strategy}-{getattr(value, 'layers', None)}",
)
def test_the_same_gradients(monkeypatch, fits, recordings, tmp_path, config, packed):
    monkeypatch.setattr(_encoder.EncoderStrategy, "_packs", lambda self, device: packed)
    source = fits.Source(dropout=0.0)
    cells = fits.cells(80, source)
    if config.strategy == "lora" and config.layers:
        cells = replace(cells, states=LowerStates(cells.tokens, source, CPU, tmp_path).rows)
    steps = [np.arange(start, start + 8) for start in range(0, 80, 8)]
    # few cells after many, whose labels and tokens are left where graphs read
    steps = [*steps, *(step[:5] for step in steps), *steps[::-1], np.arange(79, 80), np.arange(1)]
    plain = fit_of(monkeypatch, source, cells, config, records=False)
    recorded = fit_of(monkeypatch, source, cells, config, records=True)
    for number, rows in enumerate(steps):
        same(gradients(recorded, rows), gradients(plain, rows))
        if number == 3:  # as after the trial before a run
            recorded.optimizer.zero_grad(set_to_none=True)
    assert sum(recordings.replays) > len(steps) / 3
    if packed:  # all of these are of few sizes
        assert len(recordings.replays) <= 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_same_fit(monkeypatch, fits, recordings, accumulation):
    source = fits.Source(dropout=0.0)
    train, val = fits.cells(60, source), fits.cells(30, source, seed=1)
    monkeypatch.setattr(_encoder.EncoderStrategy, "_packs", lambda self, device: True)
    found = []
    for records in (False, True):
        monkeypatch.setattr(Fit, "_records", lambda self, records=records: records)
        assert not sum(recordings.replays)
        # 60 steps: with a trial of the hardest one
        options = {"batch_size": 8, "max_epochs": 8, "patience": 8, "learning_rate": 1e-3}
        strategy = fits.fit(train, val, source, accumulation=accumulation, **options)
        found.append((strategy.history, strategy.predict_proba(val)))
    (history, probabilities), (expected_history, expected) = found
    for row, other in zip(history, expected_history, strict=True):
        assert row == pytest.approx(other, abs=1e-3)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)
    assert sum(recordings.replays) > 30 * accumulation


def test_dropout_is_drawn_anew(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.4)
    cells = fits.cells(8, source)
    fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=True)
    fit.module.train()
    losses = {float(fit.gradients(np.arange(8))) for _ in range(6)}
    assert len(losses) == 6 and recordings.replays == [5]


def test_where_the_host_waits_nothing_is_recorded(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    plain, waiting = (
        fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=records) for records in (False, True)
    )
    expected, backward, calls = gradients(plain, np.arange(8)), Fit._backward, []

    def waits(self, *args):
        calls.append(1)
        loss = backward(self, *args)
        if len(calls) == 1:  # on the way back, when there are gradients already
            raise RuntimeError("called a synchronizing CUDA operation")
        return loss

    monkeypatch.setattr(Fit, "_backward", waits)
    for _ in range(3):
        same(gradients(waiting, np.arange(8)), expected)
    assert not recordings.replays and len(calls) == 4


def test_where_the_host_waits_in_a_later_form_the_step_is_repeated_as_a_whole(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(21, source)
    plain, waiting = (
        fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=records, accumulation=2)
        for records in (False, True)
    )
    many, few = np.arange(16), np.arange(16, 21)  # pieces of three cells and of two
    for _ in range(2):
        same(gradients(waiting, many), gradients(plain, many))
    assert len(recordings.replays) == 2
    expected, backward, calls = gradients(plain, few), Fit._backward, []

    def waits(self, *args):
        calls.append(1)
        if len(calls) == 2:  # where there are gradients of the first piece already
            raise RuntimeError("called a synchronizing CUDA operation")
        return backward(self, *args)

    monkeypatch.setattr(Fit, "_backward", waits)
    for _ in range(2):
        same(gradients(waiting, few), expected)
    assert len(calls) == 6 and not waiting.recorder.holds_memory


def test_where_the_host_draws_numbers_nothing_is_recorded(monkeypatch, fits, recordings, caplog):
    """As peft's LoHa does to pass a module over, which a record would do for ever or never."""
    monkeypatch.setattr(_graphs, "_host_numbers", torch.get_rng_state)
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    for config, draws in ((IA3Config(), False), (AnyPeftConfig(peft_type="LOHA", settings={"r": 2}), True)):
        fit = fit_of(monkeypatch, source, cells, config, records=True)
        fit.module.train()
        with caplog.at_level("INFO", "scdlkit"):
            for _ in range(4):
                fit.gradients(np.arange(8))
        assert recordings.replays == [3]  # of the first
        assert ("draws random numbers" in caplog.text) == draws != fit.recorder.holds_memory


def test_a_parameter_that_gets_its_first_gradient_later(monkeypatch, fits, recordings):
    one, other = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    recorder = _graphs.Recorder([one, other], longest=9, device=CPU)

    def step(batch, codes, weights):
        loss = (one + (other if len(batch.gene_ids) > 8 else 0)).sum() * weights.sum()
        loss.backward()
        return loss.detach()

    for size in (8, 9, 9, 8, 9):
        ids = torch.zeros(size, 1, dtype=torch.int64)
        recorder.clear()
        batch = Batch(ids, ids.float(), None)
        recorder.run(step, batch, np.zeros(size, np.int64), np.ones(size, np.float32), needs=0.0)
        assert float(one.grad) == size
        assert float(0 if other.grad is None else other.grad) == (size if size == 9 else 0)
    assert recordings.replays == [2, 1]


def test_other_errors_of_the_first_step_are_raised(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    fit = fit_of(monkeypatch, source, fits.cells(8, source), FullFinetuneConfig(), records=True)

    def fails(self, *_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Fit, "_backward", fails)
    with pytest.raises(RuntimeError, match="do not fit"):
        fit.gradients(np.arange(8))


def test_without_memory_to_record_steps_go_on_as_before(monkeypatch, fits, recordings, caplog):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    plain, fit = (
        fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=records) for records in (False, True)
    )
    expected = gradients(plain, np.arange(8))
    needs = 8 * int(fit.lengths[:8].max()) * fit.strategy.bytes_per_token()
    for short in (False, True):
        recordings.available = needs - short
        fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=True)
        with caplog.at_level("INFO", "scdlkit"):
            for _ in range(4):
                same(gradients(fit, np.arange(8)), expected)
        assert recordings.replays == [3] and fit.progress.accumulation == 1
        assert caplog.text.count("not enough memory") == short
        assert fit.recorder.holds_memory != short


def test_what_fails_while_it_is_recorded_says_how_to_go_without(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    fit = fit_of(monkeypatch, source, fits.cells(8, source), FullFinetuneConfig(), records=True)
    fit.gradients(np.arange(8))

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(_graphs, "record", fails)
    with pytest.raises(RuntimeError, match="not permitted") as error:
        fit.gradients(np.arange(8))
    assert "TrainingConfig(cuda_graphs=False)" in error.value.__notes__[0]


def test_no_garbage_is_collected_meanwhile():
    for on in (True, False):
        (gc.enable if on else gc.disable)()
        try:
            with _graphs._no_garbage_collection():
                assert not gc.isenabled()
            assert gc.isenabled() == on
        finally:
            gc.enable()


def test_records_make_room_before_a_step_is_cut(monkeypatch, fits, recordings, caplog):
    """The GPU has room for one record and no further step, until the record is gone."""
    source = fits.Source(dropout=0.0)
    cells = fits.cells(16, source)
    plain, fit = (
        fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=records) for records in (False, True)
    )
    once, backward, last = np.arange(8), Fit._backward, np.arange(8, 11)
    for _ in range(3):
        fit.gradients(once)
    assert recordings.replays == [2]

    def full(self, *args):
        if self is fit and fit.recorder.holds_memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return backward(self, *args)

    monkeypatch.setattr(Fit, "_backward", full)
    same(gradients(fit, last), gradients(plain, last))
    assert fit.progress.accumulation == 1 and "pieces a step" not in caplog.text
    same(gradients(fit, once), gradients(plain, once))
    assert recordings.replays == [2]


def test_what_takes_most_of_the_memory_is_not_recorded(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=True)
    n_tokens = 8 * int(fit.lengths.max())
    for budget, expected in ((2 * n_tokens - 1, []), (2 * n_tokens, [1])):
        fit.max_tokens = budget
        for _ in range(3 if not expected else 2):
            fit.gradients(np.arange(8))
        assert recordings.replays == expected


def test_the_best_epoch_has_let_go_of_them(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    train = fits.cells(16, source)
    made = []
    monkeypatch.setattr(Fit, "_records", lambda self: made.append(self) or True)
    fits.fit(train, train, source, max_epochs=6, patience=6)
    assert sum(recordings.replays) and not made[0].recorder.holds_memory


def test_nothing_is_left_of_a_fit(monkeypatch, fits, recordings):
    """Optimizer and gradients must not wait for a garbage collection, while the next strategy wants the memory."""
    source = fits.Source(dropout=0.0)
    train = fits.cells(16, source)
    made = []
    monkeypatch.setattr(Fit, "_records", lambda self: made.append(weakref.ref(self)) or True)
    gc.disable()
    try:
        fits.fit(train, train, source, max_epochs=6, patience=6)
        assert sum(recordings.replays) and made[0]() is None
    finally:
        gc.enable()


def test_records_make_room_for_validation(monkeypatch, fits, recordings):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(16, source)
    fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=True)
    expected = fit.probabilities(cells, 3)
    kind, found = type(fit.strategy), []
    probabilities = kind.probabilities

    def full(self, *args):
        found.append(fit.recorder.holds_memory)
        if found[-1] or len(found) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return probabilities(self, *args)

    for _ in range(2):
        fit.gradients(np.arange(8))
    monkeypatch.setattr(kind, "probabilities", full)
    fit.module.eval()
    np.testing.assert_allclose(fit.probabilities(cells, 3), expected, atol=1e-6)
    assert found == [True, False]
    with pytest.raises(torch.cuda.OutOfMemoryError):  # as ever where there is nothing to give back
        fit.probabilities(cells, 3)


@pytest.mark.parametrize("option", ["cuda_graphs", "compile", "gradient_checkpointing"])
def test_options_that_go_without(monkeypatch, fits, option):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    records = Fit._records
    for value in (False, True):
        fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=False, **{option: value})
        assert not records(fit)  # on a CPU
        fit.device = torch.device("cuda")
        assert not records(fit)  # in float32
        fit._dtype = torch.bfloat16
        assert records(fit) == (value == (option == "cuda_graphs"))
        fit.n_processes = 2
        assert not records(fit)


def test_logits_of_its_own_are_not_passed_over(monkeypatch, fits):
    source = fits.Source(dropout=0.0)
    cells = fits.cells(8, source)
    records, kind = Fit._records, get_strategy("full_finetune")

    class Doubled(kind):
        def logits(self, part):
            return 2 * super().logits(part)

    class Both(Doubled):
        def inputs(self, part):
            return super().inputs(part)

    class Renamed(kind):
        pass

    fit = fit_of(monkeypatch, source, cells, FullFinetuneConfig(), records=False)
    fit.device, fit._dtype = torch.device("cuda"), torch.bfloat16
    for other, expected in ((Doubled, False), (Both, True), (Renamed, True), (kind, True)):
        fit.strategy.__class__ = other
        assert records(fit) == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=100), st.integers(0, 60))
def test_few_sizes(lengths, more):
    longest = max(lengths) + more
    starts = np.append(0, np.cumsum(lengths))
    ids = torch.zeros(starts[-1], dtype=torch.int32)
    batch = PackedBatch(ids, ids, packed_cells(starts, usual=0, device=CPU))
    filled, sizes = _graphs._filled(batch, longest, CPU)
    ends = filled.cells.starts.numpy()
    np.testing.assert_array_equal(ends[: len(starts)], starts)
    added = np.diff(ends[len(starts) - 1 :])
    assert len(added) == -(-len(lengths) // 32) == _graphs._n_cells(filled) - len(lengths)
    assert added.min() >= 1 and added.max() <= filled.cells.longest == longest + 1
    assert sizes == [ends[-1], ends[-1], len(ends)] and not filled.cells.alike
    assert added.sum() < starts[-1] / 32 + 1 + len(added)
    assert ends[-1] % max(1, 2 ** int(np.log2(starts[-1])) // 32) == 0


def test_trained_through_a_trainer(monkeypatch, fits, recordings):
    """The head has no batch of its own to record, and learns as ever."""
    source = fits.Source(dropout=0.0)
    train = fits.cells(30, source)
    found = []
    for records in (False, True):
        monkeypatch.setattr(Fit, "_records", lambda self, records=records: records)
        head = get_strategy("head")()
        head.fit(train, train, n_classes=3, seed=0, trainer=Trainer(progress=False))
        found.append(head.history)
    assert found[0] == found[1] and not recordings.replays
