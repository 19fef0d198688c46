"""One strategy on one split: fitted, measured and predicted, or taken up from an earlier run."""

from __future__ import annotations

import importlib
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from ._memory import PeakMemory
from ._processes import from_main
from ._run_state import Finished, FitState
from ._training_state import describe_run
from .splits import Split
from .strategies import CellData, GradientStrategy, Strategy
from .training import Trainer

PARTS = ("val", "test")


class FitResult(NamedTuple):
    """What a fit gave, besides the fitted strategy."""

    probabilities: dict[str, np.ndarray]  # of "val" and "test", float32 [cells, classes]
    fit_seconds: float
    peak_memory_mb: float  # above the start of the fit


def fit_strategy(
    strategy: Strategy,
    cells: CellData,
    split: Split,
    *,
    n_classes: int,
    seed: int,
    device: str,
    progress: bool,
    state: FitState | None = None,
) -> FitResult:
    """Fit a strategy on the training cells and predict the others.

    Parameters
    ----------
    strategy
        Not yet fitted.
    cells
        All cells, with every part that it needs.
    split
        Part of each of ``cells``.
    n_classes, seed, device, progress
        Passed on to the fit.
    state
        Where epochs and the result are kept; what is there already is not computed again.

    Raises
    ------
    StateError
        If the state is of another run.
    """
    for library in strategy.libraries:
        importlib.import_module(library)
    readable = cells.only(strategy.needs | strategy.needs_to_fit)
    parts = {part: readable.subset(getattr(split, part)) for part in ("train", *PARTS)}
    trainer = Trainer(progress=progress)
    run: dict[str, Any] = {}
    if state is not None:
        run = describe_run(strategy, parts["train"], parts["val"], test=parts["test"], n_classes=n_classes, seed=seed)
        if (finished := state.read(strategy.name, run)) is not None:
            return _take_up(strategy, finished)
        trainer = Trainer(progress=progress, state_dir=state.folder, resume=True)
    if isinstance(strategy, GradientStrategy):
        trainer.warm_up()
    started = time.perf_counter()
    with PeakMemory(device) as memory:
        strategy.fit(parts["train"], parts["val"], n_classes=n_classes, seed=seed, device=device, trainer=trainer)
    seconds = trainer.seconds_before + time.perf_counter() - started
    probabilities = {part: strategy.predict_proba(parts[part]) for part in PARTS}
    # all processes go on with the same numbers, or each might find another strategy the best
    outcome = from_main(lambda: FitResult(probabilities, seconds, memory.mb), torch.device(device))
    if state is not None:
        learnt = strategy.state_dict() if state.keep else {}
        finished = Finished(
            learnt,
            strategy.metadata(),
            list(strategy.history),
            outcome.fit_seconds,
            outcome.peak_memory_mb,
            outcome.probabilities,
        )
        state.write(strategy.name, run, finished)
    return outcome


def _take_up(strategy: Strategy, finished: Finished) -> FitResult:
    if finished.state:
        strategy.load_state(finished.state, finished.metadata)
    strategy.n_trainable, strategy.history = finished.metadata["n_trainable"], finished.history
    return FitResult(finished.probabilities, finished.fit_seconds, finished.peak_memory_mb)
