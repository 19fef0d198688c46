"""Training through torch.compile gives what training without it gives, and never stands in the way."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch

from scdlkit.foundation import _fit
from scdlkit.foundation.model import Block

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(scope="module")
def data(fits):
    source = fits.Source(dropout=0.0)
    return fits.cells(64, source), fits.cells(30, source, seed=1), source


@pytest.fixture
def compiled(monkeypatch):
    """Shapes that went through compiled blocks."""
    compile_, shapes = torch.compile, []

    def logged(function, **options):
        fast = compile_(function, **options)
        return lambda block, x, keep: (shapes.append((len(x), keep is None)), fast(block, x, keep))[1]

    monkeypatch.setattr(torch, "compile", logged)
    return shapes


def blocks(strategy) -> list[Block]:
    return [module for module in strategy.trained_module().modules() if isinstance(module, Block)]


@needs_compiler
def test_the_same_gradients_and_fit(fits, data, compiled, caplog, monkeypatch):
    gradients: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    step = _fit.Fit._gradients

    def noted(self, *args):
        value = step(self, *args)
        gradients[self.config.compile] += [
            parameter.grad.clone() for parameter in self.module.parameters() if parameter.grad is not None
        ]
        return value

    monkeypatch.setattr(_fit.Fit, "_gradients", noted)
    plain = fits.fit(*data, max_epochs=2)
    assert not compiled
    with caplog.at_level(logging.INFO, "scdlkit"):
        fast = fits.fit(*data, max_epochs=2, compile=True)
    assert [message for message in caplog.messages if message.startswith("adapter: compiled in ")]
    assert (16, False) in compiled
    first = len(gradients[False]) // 8  # of 4 steps an epoch
    assert first > 5 and len(gradients[True]) == len(gradients[False])
    for one, other in zip(gradients[False][:first], gradients[True][:first], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    np.testing.assert_allclose(fast.predict_proba(data[1]), plain.predict_proba(data[1]), atol=1e-4)
    assert len(blocks(fast)) == 2 and all(block.compiled is None for block in blocks(fast))


@needs_compiler
def test_what_is_compiled_first_holds_for_every_step(fits, compiled, monkeypatch):
    """Whatever the number and length of cells, with padding and without, with dropout and checkpointing."""
    source = fits.Source(dropout=0.3)
    cells = fits.cells(66, source)  # 4 in a step, 2 in the last
    alike = np.flatnonzero(np.isin(cells.tokens.lengths, [12, 20, 25]))
    cells = cells.subset(np.concatenate([np.arange(66), alike, alike, alike]))
    train = _fit.Fit.run_epoch

    def without_compiler(self, bar):
        with torch._dynamo.config.patch(error_on_recompile=True):
            return train(self, bar)

    monkeypatch.setattr(_fit.Fit, "run_epoch", without_compiler)
    losses = []
    for again in (False, True):
        strategy = fits.fit(
            cells, cells, source, max_epochs=1, batch_size=4, compile=True, gradient_checkpointing=again
        )
        losses.append(strategy.history[0]["train_loss"])
    assert {(4, True), (4, False)} <= set(compiled)
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("when", ["asked for", "called"])
def test_without_a_compiler_it_trains_as_usual(fits, data, monkeypatch, caplog, when):
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found.\nTried g++, clang++.")

    monkeypatch.setattr(torch, "compile", no_compiler if when == "asked for" else lambda *_, **__: no_compiler)
    plain = fits.fit(*data, max_epochs=2)
    with caplog.at_level(logging.WARNING, "scdlkit"):
        other = fits.fit(*data, max_epochs=2, compile=True)
    assert caplog.messages == [
        "adapter: torch.compile failed, training goes on without it: No working C++ compiler found."
    ]
    assert other.history == plain.history
