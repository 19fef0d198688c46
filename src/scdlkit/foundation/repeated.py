"""Every strategy on every fit: the loop over repeats, folds and strategies, and what came out of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from scdlkit._settings import logger, settings

from ._processes import launched_processes
from ._run_state import RunState
from ._summary import (
    Run,
    difference_table,
    fold_table,
    history_table,
    leakage_table,
    per_class_table,
    results_table,
)
from .comparison import PARTS, Outcome, run_strategy
from .intervals import Resampled, resample_macro_f1
from .plan import Fit
from .recommendation import best_of, recommend
from .strategies import CellData, Strategy

_UNFINISHED = "KeyboardInterrupt: not finished"


@dataclass
class Comparison:
    """Outcome of :func:`compare`.

    Parameters
    ----------
    table
        One row a strategy in the order they ran: strategy, role ("strategy" or "baseline"), uses_encoder (False where
        there is no foundation model in it), rank (1 is best, baselines included, failed ones last), metrics of
        validation and test as means over the fits, sd of the macro-F1 over the fits (NaN for one) with the bounds of
        its 95 % interval, auroc_note, n_trainable, fit_seconds (mean), peak_memory_mb (maximum, above the start of a
        fit), n_fits that finished, error ("" where there was none).
    folds
        One row a strategy and fit.
    history
        strategy, repeat, fold, epoch (0 for fits without epochs), train_loss, val_loss, val_macro_f1.
    per_class
        strategy, split, class, precision, recall, f1 (means over the fits), f1_sd, support (mean).
    differences
        strategy, reference, reference_role, split, difference of the macro-F1, low, high, excludes_zero.
    leakage
        strategy, role, split, by_cell, by_group, gap, low, high; without rows unless there are fits of both kinds.
    fitted
        Strategies that did not fail on the first fit, by name.
    best
        Best-ranked strategy that is no baseline; the best baseline if all the others failed or none was asked for.
    recommendation
        One sentence.
    errors
        Reasons of those that failed, by name.
    interrupted
        What an interrupt (Ctrl-C) has cut off, as a sentence; empty if nothing.
    resampled
        Resampled macro-F1 of ``"val"`` and ``"test"``.
    """

    table: pd.DataFrame
    folds: pd.DataFrame
    history: pd.DataFrame
    per_class: pd.DataFrame
    differences: pd.DataFrame
    leakage: pd.DataFrame
    fitted: dict[str, Strategy]
    best: str
    recommendation: str
    errors: dict[str, str]
    interrupted: str = ""
    resampled: dict[str, Resampled] = field(default_factory=dict)


def compare(
    strategies: Sequence[Strategy],
    cells: CellData,
    fits: Sequence[Fit],
    classes: Sequence[str] | np.ndarray,
    *,
    device: str = "cpu",
    progress: bool | None = None,
    state: RunState | None = None,
) -> Comparison:
    """Fit every strategy on the training cells of every fit, and measure it on the validation and test cells.

    A strategy that fails does not lose the others: its row carries the error, and it counts as failed if one fit of it
    failed. After an interrupt (Ctrl-C) what is finished is compared: the strategies that were done with the first fit,
    or all of them on the fits that were complete. Validation ranks, test is reported.

    Parameters
    ----------
    strategies
        Not yet fitted, with different names. These are fitted on the first fit, copies of them on the others.
    cells
        All cells, with every part that the strategies need.
    fits
        Splits of ``cells``. Ranks and scores are of those that split as the first one does, by cell or by group; fits
        of the other kind stand beside them as the leakage.
    classes
        Names of the classes.
    device
        Passed on to every fit.
    progress
        Show a progress bar; the setting by default.
    state
        Where epochs and finished strategies are kept; what is there already is not computed again.

    Returns
    -------
    Comparison
        Tables, the strategies of the first fit, and what to make of it.

    Raises
    ------
    ValueError
        If there is no strategy or no fit, two strategies have one name, or ``cells`` and a split disagree.
    RuntimeError
        If all strategies fail; says why each did.
    KeyboardInterrupt
        If it is interrupted before any strategy is finished, or while several processes work together.

    Warns
    -----
    UserWarning
        If the comparison is interrupted, a strategy fails, or predicts one class for more than 99 % of the validation cells while there are more.

    Example
    -------
    >>> fits = SplitPlan(n_repeats=5).fits(codes, names, classes=["B", "T"])
    >>> result = compare([FrozenProbe(), Head(), PCALogReg()], cells, fits, ["B", "T"])
    >>> result.best, result.recommendation
    """
    classes = [str(label) for label in classes]
    _check(strategies, cells, fits)
    runs, interrupted = _run(strategies, cells, fits, classes, device=device, progress=progress, state=state)
    by = fits[0].split_by
    headline = [(fit, outcome) for fit, outcome in runs if fit.split_by == by]
    others = [(fit, outcome) for fit, outcome in runs if fit.split_by != by]
    resampled = _resample(headline, cells, len(classes), seed=fits[0].seed)
    table = results_table(headline, resampled)
    errors = {str(name): str(why) for name, why in zip(table["strategy"], table["error"], strict=True) if why}
    if len(errors) == len(table):
        raise RuntimeError("All strategies failed. " + " ".join(f"{name}: {why}" for name, why in errors.items()))
    best = best_of(table, "strategy") or best_of(table, "baseline")
    return Comparison(
        table=table,
        folds=fold_table(runs),
        history=history_table(headline),
        per_class=per_class_table(headline, classes),
        differences=difference_table(table, resampled, best),
        leakage=_leakage(table, resampled, others, cells, len(classes), seed=fits[0].seed + 1),
        fitted={outcome.strategy: outcome.fitted for _, outcome in runs if outcome.fitted is not None},
        best=best,
        recommendation=recommend(table, resampled["val"]),
        errors=errors,
        interrupted=interrupted,
        resampled=resampled,
    )


def _run(
    strategies: Sequence[Strategy],
    cells: CellData,
    fits: Sequence[Fit],
    classes: list[str],
    *,
    device: str,
    progress: bool | None,
    state: RunState | None,
) -> tuple[list[Run], str]:
    """The loop over fits and strategies, and what an interrupt has cut off."""
    show = settings.progress if progress is None else progress
    runs: list[Run] = []
    interrupted = ""
    with tqdm(total=len(fits) * len(strategies), unit="fit", disable=not show) as bar:
        for number, fit in enumerate(fits):
            kept = number == 0  # of the others the predictions alone
            of_fit = None if state is None else state.fit(fit.split_by, fit.repeat, fit.fold, keep=kept)
            outcomes: list[Outcome] = []
            try:
                for strategy in strategies:
                    bar.set_description(strategy.name if len(fits) == 1 else f"{strategy.name}, {_where(fit)}")
                    outcome = run_strategy(
                        strategy if kept else strategy.unfitted(),
                        cells,
                        fit.split,
                        classes,
                        seed=fit.seed,
                        device=device,
                        progress=show,
                        state=of_fit,
                    )
                    outcome.fitted = outcome.fitted if kept else None
                    outcomes.append(outcome)
                    bar.update()
            except KeyboardInterrupt:
                # processes may be interrupted at different moments, so several do not go on
                if launched_processes() > 1 or (kept and all(outcome.error for outcome in outcomes)):
                    logger.warning("Interrupted, nothing is compared. %s", _how_to_go_on(state))
                    raise
                interrupted = _interrupted(strategies, outcomes, fits, number)
                rest = strategies[len(outcomes) :]
                outcomes += [Outcome(s.name, s.role, s.uses_encoder, error=_UNFINISHED) for s in rest]
            if kept or not interrupted:
                runs += [(fit, outcome) for outcome in outcomes]
            if interrupted or (kept and all(outcome.error for outcome in outcomes)):
                break
    if interrupted:
        warnings.warn(f"{interrupted} {_how_to_go_on(state)}", UserWarning, stacklevel=3)
        runs = [(fit, outcome) for fit, outcome in runs if fit.split_by == fits[0].split_by]
    return runs, interrupted


def _interrupted(strategies: Sequence[Strategy], outcomes: list[Outcome], fits: Sequence[Fit], number: int) -> str:
    """What an interrupt in a fit leaves out, as a sentence. A later fit counts if all strategies finished it."""
    if number == 0:
        return f"Interrupted: {', '.join(s.name for s in strategies[len(outcomes) :])} not finished and not compared."
    wanted = sum(fit.split_by == fits[0].split_by for fit in fits)
    without = "" if wanted == len(fits) else ", without the leakage gap"
    return f"Interrupted: the results are those of {min(number, wanted)} of {wanted} fits{without}."


def _how_to_go_on(state: RunState | None) -> str:
    if state is None:
        return "A call with output_dir keeps what it has done, and the same call with resume=True goes on."
    return "The same call with resume=True goes on."


def _resample(runs: Sequence[Run], cells: CellData, n_classes: int, *, seed: int) -> dict[str, Resampled]:
    """Of each part that has cells in every fit, the strategies that failed in none."""
    failed = {outcome.strategy for _, outcome in runs if outcome.error}
    fits = list({id(fit): fit for fit, _ in runs}.values())
    predicted: dict[str, list[Outcome]] = {}
    for _, outcome in runs:
        if outcome.strategy not in failed:
            predicted.setdefault(outcome.strategy, []).append(outcome)
    found = {}
    for part in PARTS:
        true = [np.asarray(cells.codes)[getattr(fit.split, part)] for fit in fits]
        if predicted and all(len(codes) for codes in true):
            codes = {name: [outcome.predicted_codes[part] for outcome in of] for name, of in predicted.items()}
            found[part] = resample_macro_f1(true, codes, n_classes, seed=seed)
    return found


def _leakage(
    table: pd.DataFrame,
    headline: dict[str, Resampled],
    others: Sequence[Run],
    cells: CellData,
    n_classes: int,
    seed: int,
) -> pd.DataFrame:
    if not others:
        return leakage_table(table.iloc[:0], {}, {})
    return leakage_table(table, by_group=headline, by_cell=_resample(others, cells, n_classes, seed=seed))


def _check(strategies: Sequence[Strategy], cells: CellData, fits: Sequence[Fit]) -> None:
    names = [strategy.name for strategy in strategies]
    if not names:
        raise ValueError("strategies is empty; name at least one.")
    if len(set(names)) < len(names):
        raise ValueError(f"strategies must have different names, found {', '.join(names)}.")
    if not fits:
        raise ValueError("fits is empty; give at least one split.")
    n_codes = 0 if cells.codes is None else len(cells.codes)
    for fit in fits:
        if n_codes != len(fit.split.assignment):
            raise ValueError(f"cells has {n_codes} label codes, {_where(fit)} {len(fit.split.assignment)} cells.")


def _where(fit: Fit) -> str:
    return f"repeat {fit.repeat} fold {fit.fold} by {fit.split_by}"
