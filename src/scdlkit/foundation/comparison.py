"""One strategy on one split: fit it, measure it, and let its failure be a result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from scdlkit._settings import logger

from ._one_fit import PARTS, fit_strategy
from ._processes import launched_processes
from ._run_state import FitState
from ._training_state import StateError
from .metrics import METRICS, classification_metrics, per_class_metrics
from .splits import Split
from .strategies import CellData, Strategy

_COLLAPSED = 0.99
_MET_BY_ALL = (ValueError, TypeError, ImportError, FloatingPointError)  # errors that all processes meet alike


@dataclass
class Outcome:
    """What one strategy did on one split.

    Parameters
    ----------
    strategy, role, uses_encoder
        As the strategy says of itself.
    error
        Why it failed, else empty.
    fit_seconds, peak_memory_mb
        Of the fit alone; memory above what was in use before.
    n_trainable
        Trained parameters.
    metrics
        ``"val_macro_f1"`` and so on for every metric and part that has cells; empty if it failed.
    notes
        Why an AUROC is not defined, or a part has no cells.
    history
        Rows of epoch (0 for fits without epochs), train_loss, val_loss, val_macro_f1.
    per_class
        Precision, recall, F1 and support of every class, by part.
    predicted_codes
        Predictions for the cells of each part.
    fitted
        The fitted strategy; None if it failed.
    """

    strategy: str
    role: str
    uses_encoder: bool
    error: str = ""
    fit_seconds: float = float("nan")
    peak_memory_mb: float = float("nan")
    n_trainable: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    per_class: dict[str, pd.DataFrame] = field(default_factory=dict)
    predicted_codes: dict[str, np.ndarray] = field(default_factory=dict)
    fitted: Strategy | None = None


def run_strategy(
    strategy: Strategy,
    cells: CellData,
    split: Split,
    classes: Sequence[str],
    *,
    seed: int,
    device: str,
    progress: bool,
    state: FitState | None = None,
) -> Outcome:
    """Fit on the training cells, measure on the validation and test cells.

    Parameters
    ----------
    strategy
        To be fitted, in place.
    cells
        All cells with their codes and every part that the strategy needs.
    split
        Part of each of ``cells``.
    classes
        Names of the classes.
    seed, device, progress
        Passed on to the fit.
    state
        Where epochs and the result are kept; what is there already is not computed again.

    Raises
    ------
    StateError
        If the state is of another run.

    Warns
    -----
    UserWarning
        If the strategy fails, or predicts one class for more than 99 % of the validation cells while there are more.
    """
    name = strategy.name
    outcome = Outcome(name, strategy.role, strategy.uses_encoder)
    true = {part: np.asarray(cells.codes)[getattr(split, part)] for part in PARTS}
    started = time.perf_counter()
    try:
        result = fit_strategy(
            strategy, cells, split, n_classes=len(classes), seed=seed, device=device, progress=progress, state=state
        )
        outcome.fit_seconds, outcome.peak_memory_mb = result.fit_seconds, result.peak_memory_mb
        _measure(outcome, true, result.probabilities, classes)
    except StateError:
        raise
    except Exception as error:  # any failure of one strategy must leave the others
        if launched_processes() > 1 and not isinstance(error, _MET_BY_ALL):
            raise  # the other processes wait for this one
        outcome.error = f"{type(error).__name__}: {error}"
        outcome.fit_seconds = time.perf_counter() - started
        outcome.metrics, outcome.notes = {}, []
        logger.debug("%s failed", name, exc_info=True)
        warnings.warn(f"Strategy {name!r} failed and is left out: {outcome.error}", UserWarning, stacklevel=3)
    else:
        outcome.n_trainable, outcome.history, outcome.fitted = strategy.n_trainable, list(strategy.history), strategy
        _warn_if_collapsed(outcome, true["val"], classes)
    return outcome


def _measure(
    outcome: Outcome, codes: dict[str, np.ndarray], probabilities: dict[str, np.ndarray], classes: Sequence[str]
) -> None:
    for part, true in codes.items():
        predicted = outcome.predicted_codes[part] = probabilities[part].argmax(1)
        if len(true) == 0:
            outcome.notes.append(f"{part}: no cells")
            continue
        found = classification_metrics(true, probabilities[part], classes)
        outcome.metrics |= {f"{part}_{metric}": float(found[metric]) for metric in METRICS}
        if found["auroc_note"]:
            outcome.notes.append(f"{part}: {found['auroc_note']}")
        outcome.per_class[part] = per_class_metrics(true, predicted, classes)


def _warn_if_collapsed(outcome: Outcome, true: np.ndarray, classes: Sequence[str]) -> None:
    predicted = outcome.predicted_codes["val"]
    counts = np.bincount(predicted, minlength=len(classes))
    most, largest = int(counts.argmax()), counts.max() / len(predicted)
    if largest > _COLLAPSED and (true == most).mean() <= _COLLAPSED:
        warnings.warn(
            f"Strategy {outcome.strategy!r} predicts {classes[most]} for {100 * largest:.1f} % of the validation "
            f"cells, which are of {len(np.unique(true))} classes. Check the gene overlap, the class sizes "
            "(class_weight='balanced' may help) and the learning rate.",
            UserWarning,
            stacklevel=4,
        )
