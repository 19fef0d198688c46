"""A fit that is finished is taken up, whatever the strategy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scdlkit.foundation._one_fit import fit_strategy
from scdlkit.foundation._run_state import FitState
from scdlkit.foundation._training_state import StateError
from scdlkit.foundation.splits import Split
from scdlkit.foundation.strategies import FrozenProbe, Head, HeadConfig, TrainingConfig

SPLIT = Split((np.arange(60) // 3 % 4).clip(1) - 1)
ARGUMENTS = {"n_classes": 3, "seed": 1, "device": "cpu", "progress": False}


def strategies(fits, source):
    head = Head(HeadConfig(training=TrainingConfig(max_epochs=3)), name="a head/1")
    return [FrozenProbe(), head, fits.build(source, max_epochs=2)]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("keep", [True, False])
def test_finished_once(fits, tmp_path, index, keep):
    source = fits.Source(dropout=0.1)
    cells = fits.cells(60, source)
    plain = strategies(fits, source)[index]
    expected = fit_strategy(plain, cells, SPLIT, **ARGUMENTS)
    state = FitState(tmp_path, torch.device("cpu"), keep=keep)
    first, second = strategies(fits, source)[index], strategies(fits, source)[index]
    done = fit_strategy(first, cells, SPLIT, **ARGUMENTS, state=state)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(".finished.pt")
    second.fit = lambda *_, **__: pytest.fail("fitted again")
    again = fit_strategy(second, cells, SPLIT, **ARGUMENTS, state=state)
    for part in ("val", "test"):
        np.testing.assert_array_equal(done.probabilities[part], expected.probabilities[part])
        np.testing.assert_array_equal(again.probabilities[part], expected.probabilities[part])
    assert again[1:] == done[1:] and again.fit_seconds > 0
    assert second.history == first.history and second.n_trainable == first.n_trainable
    if keep:
        np.testing.assert_allclose(second.predict_proba(cells), first.predict_proba(cells), atol=1e-6)
    else:
        with pytest.raises(RuntimeError, match="not fitted"):
            second.predict_proba(cells)
    other = strategies(fits, source)[index]
    with pytest.raises(StateError, match="different training cells"):
        fit_strategy(other, cells, Split(np.roll(SPLIT.assignment, 7)), **ARGUMENTS, state=state)
