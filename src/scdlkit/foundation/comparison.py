"""Run strategies on one split, rank them by validation, and say whether the foundation model is worth it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from scdlkit._settings import logger, settings

from ._one_fit import PARTS, fit_strategy
from ._processes import launched_processes
from ._run_state import FitState
from ._training_state import StateError
from .metrics import METRICS, classification_metrics, per_class_metrics
from .splits import Split
from .strategies import CellData, Strategy
from .strategies._scores import f1_scores

TABLE_COLUMNS = (
    "strategy",
    "role",
    "uses_encoder",
    "rank",
    *(f"{part}_{metric}" for part in PARTS for metric in METRICS),
    "auroc_note",
    "n_trainable",
    "fit_seconds",
    "peak_memory_mb",
    "error",
)
HISTORY_COLUMNS = ("strategy", "epoch", "train_loss", "val_loss", "val_macro_f1")
PER_CLASS_COLUMNS = ("strategy", "split", "class", "precision", "recall", "f1", "support")

# Ranking: validation alone, then the smaller model, then the faster one.
_RANK_BY = {
    "val_macro_f1": False,
    "val_balanced_accuracy": False,
    "val_accuracy": False,
    "n_trainable": True,
    "fit_seconds": True,
}
_COLLAPSED = 0.99
_RESAMPLES = 1000
_MET_BY_ALL = (ValueError, TypeError, ImportError, FloatingPointError)  # errors that all processes meet alike


@dataclass
class Comparison:
    """Outcome of :func:`compare`.

    Parameters
    ----------
    table
        One row a strategy in the order they ran: strategy, role ("strategy" or "baseline"), uses_encoder (False where
        there is no foundation model in it), rank (1 is best, baselines included, failed ones last), metrics of
        validation and test, auroc_note, n_trainable, fit_seconds, peak_memory_mb (above the start of the fit), error
        ("" where there was none).
    history
        strategy, epoch (0 for fits without epochs), train_loss, val_loss, val_macro_f1.
    per_class
        strategy, split, class, precision, recall, f1, support.
    fitted
        Strategies that did not fail, by name.
    best
        Best-ranked strategy that is no baseline; the best baseline if all the others failed or none was asked for.
    errors
        Reasons of those that failed, by name.
    true_codes
        Labels of the cells of ``"val"`` and ``"test"``.
    predicted_codes
        Predictions for the same cells, by strategy and part.
    unfinished
        Strategies that an interrupt (Ctrl-C) left unfinished; their rows say so under error.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    per_class: pd.DataFrame
    fitted: dict[str, Strategy]
    best: str
    errors: dict[str, str]
    true_codes: dict[str, np.ndarray] = field(default_factory=dict)
    predicted_codes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()

    def recommend(self, *, seed: int = 0) -> str:
        """One sentence: is the best strategy worth more than the best baseline without the foundation model?

        Judged by the difference in validation macro-F1 against its standard error, from a paired bootstrap over the
        validation cells. A baseline within one standard error of the best strategy, or above it, means that the
        foundation model is not worth it here. Test figures are quoted, and decide nothing.

        Parameters
        ----------
        seed
            Of the bootstrap.
        """
        rows = self.table[self.table["error"] == ""].sort_values("rank").set_index("strategy")
        strategies = rows.index[rows["role"] == "strategy"]
        baselines = rows.index[(rows["role"] == "baseline") & ~rows["uses_encoder"].astype(bool)]
        if len(strategies) == 0:
            return f"No strategy but the baseline {self.best} finished, so there is nothing to recommend it against."
        best = rows.loc[strategies[0]]
        reached = f"{best.name} reaches a validation macro-F1 of {best['val_macro_f1']:.3f}"
        if len(baselines) == 0:
            return f"{reached}{_test_only(best)}; no baseline ran, so whether the foundation model is worth it is open."
        baseline = rows.loc[baselines[0]]
        difference, error = self.difference(str(best.name), str(baseline.name), seed=seed)
        against = f"{reached}, the baseline {baseline.name} {baseline['val_macro_f1']:.3f}"
        margin = f"difference {difference:+.3f}, standard error {error:.3f}; {_test_both(best, baseline)}"
        if difference > error:
            return f"{against}: the foundation model is ahead by more than one standard error ({margin})."
        how = "no worse" if difference <= 0 else "behind by no more than one standard error"
        return f"{against}: the foundation model is not worth it here, the baseline is {how} ({margin})."

    def difference(self, first: str, second: str, *, seed: int = 0) -> tuple[float, float]:
        """Validation macro-F1 of ``first`` minus ``second``, and its standard error over the validation cells.

        Parameters
        ----------
        first, second
            Names of fitted strategies.
        seed
            Of the bootstrap, 1,000 resamples of the cells, the same for both.

        Raises
        ------
        KeyError
            If a strategy is not among the fitted ones.
        """
        if unknown := [name for name in (first, second) if name not in self.predicted_codes]:
            raise KeyError(f"No predictions of {', '.join(unknown)}; there are {', '.join(self.predicted_codes)}.")
        true = self.true_codes["val"]
        one, two = (self.predicted_codes[name]["val"] for name in (first, second))
        n_classes = int(max(true.max(), one.max(), two.max())) + 1
        # Cells that agree in label and both predictions are alike: resample their numbers, not the cells.
        kinds, counts = np.unique(np.stack([true, one, two]), axis=1, return_counts=True)
        rng = np.random.default_rng(seed)
        draws = np.vstack([counts, rng.multinomial(len(true), counts / len(true), size=_RESAMPLES)])
        scores = [_weighted_macro_f1(kinds[0], predicted, draws, n_classes) for predicted in kinds[1:]]
        differences = scores[0] - scores[1]
        return float(differences[0]), float(differences[1:].std(ddof=1))


def compare(
    strategies: Sequence[Strategy],
    cells: CellData,
    split: Split,
    classes: Sequence[str] | np.ndarray,
    *,
    seed: int = 42,
    device: str = "cpu",
    progress: bool | None = None,
    state: FitState | None = None,
) -> Comparison:
    """Fit every strategy on the training cells, and measure it on the validation and test cells.

    A strategy that fails does not lose the others: its row carries the error. After an interrupt (Ctrl-C) the strategies
    that are finished are compared, and a warning names the others. Validation ranks, test is reported.

    Parameters
    ----------
    strategies
        Not yet fitted, with different names.
    cells
        All cells, with every part that the strategies need.
    split
        Part of each of ``cells``.
    classes
        Names of the classes.
    seed, device
        Passed on to every fit.
    progress
        Show a progress bar; the setting by default.
    state
        Where epochs and finished strategies are kept; what is there already is not computed again.

    Returns
    -------
    Comparison
        Table, history, per-class metrics and the fitted strategies.

    Raises
    ------
    ValueError
        If there is no strategy, two have one name, or ``cells`` and ``split`` disagree.
    RuntimeError
        If all strategies fail; says why each did.
    KeyboardInterrupt
        If it is interrupted before any strategy is finished, or while several processes work together.

    Warns
    -----
    UserWarning
        If a strategy fails, the comparison is interrupted, or a strategy predicts one class for more than 99 % of the
        validation cells while there are more.

    Example
    -------
    >>> result = compare([FrozenProbe(), Head(), PCALogReg()], cells, split, ["B", "T"])
    >>> result.best, result.recommend()
    """
    names, classes = [strategy.name for strategy in strategies], [str(label) for label in classes]
    if not names:
        raise ValueError("strategies is empty; name at least one.")
    if len(set(names)) < len(names):
        raise ValueError(f"strategies must have different names, found {', '.join(names)}.")
    if cells.codes is None or len(cells.codes) != len(split.assignment):
        n_codes = 0 if cells.codes is None else len(cells.codes)
        raise ValueError(f"cells has {n_codes} label codes, split {len(split.assignment)} cells.")
    true_codes = {part: np.asarray(cells.codes)[getattr(split, part)] for part in PARTS}
    show = settings.progress if progress is None else progress
    rows, history, per_class = [], [], []
    fitted: dict[str, Strategy] = {}
    errors: dict[str, str] = {}
    predicted_codes: dict[str, dict[str, np.ndarray]] = {}
    unfinished: list[str] = []
    bar = tqdm(strategies, unit="strategy", disable=not show)
    for strategy in bar:
        name = strategy.name
        bar.set_description(name)
        row: dict[str, object] = {"strategy": name, "role": strategy.role, "error": ""}
        row |= {"uses_encoder": strategy.uses_encoder}
        started = time.perf_counter()
        try:
            probabilities, *costs = fit_strategy(
                strategy, cells, split, n_classes=len(classes), seed=seed, device=device, progress=show, state=state
            )
            row |= dict(zip(("fit_seconds", "peak_memory_mb"), costs, strict=True))
            row |= {"n_trainable": strategy.n_trainable}
            row |= _metrics(true_codes, probabilities, classes)
        except StateError:
            raise
        except KeyboardInterrupt:
            bar.close()
            unfinished = [other.name for other in strategies if other.name not in {*fitted, *errors}]
            if not fitted or launched_processes() > 1:  # processes may be interrupted at different moments
                logger.warning("Interrupted, nothing is compared. %s", _how_to_go_on(state))
                raise
            break
        except Exception as error:  # any failure of one strategy must leave the others
            if launched_processes() > 1 and not isinstance(error, _MET_BY_ALL):
                raise  # the other processes wait for this one
            errors[name] = f"{type(error).__name__}: {error}"
            row |= {"error": errors[name], "fit_seconds": time.perf_counter() - started}
            logger.debug("%s failed", name, exc_info=True)
            warnings.warn(f"Strategy {name!r} failed and is left out: {errors[name]}", UserWarning, stacklevel=2)
        else:
            fitted[name] = strategy
            predicted_codes[name] = {part: probabilities[part].argmax(1) for part in PARTS}
            history += [{"strategy": name, **entry} for entry in strategy.history]
            for part in PARTS:
                if len(true_codes[part]):
                    table = per_class_metrics(true_codes[part], predicted_codes[name][part], classes)
                    per_class.append(table.assign(strategy=name, split=part))
            _warn_if_collapsed(name, true_codes["val"], predicted_codes[name]["val"], classes)
        rows.append(row)
    if unfinished:
        _warn_of_interrupt(unfinished, list(fitted), state)
        rows += [_unfinished_row(strategy) for strategy in strategies if strategy.name in unfinished]
    if not fitted:
        raise RuntimeError("All strategies failed. " + " ".join(f"{name}: {why}" for name, why in errors.items()))
    table = _ranked(pd.DataFrame(rows, columns=list(TABLE_COLUMNS)))
    order = table.sort_values("rank")
    order = order[order["error"] == ""]
    candidates = order[order["role"] == "strategy"]
    best = str((candidates if len(candidates) else order)["strategy"].iloc[0])
    comparison = Comparison(
        table=table,
        history=pd.DataFrame(history, columns=list(HISTORY_COLUMNS)),
        per_class=pd.concat(per_class, ignore_index=True)[list(PER_CLASS_COLUMNS)],
        fitted=fitted,
        best=best,
        errors=errors,
        true_codes=true_codes,
        predicted_codes=predicted_codes,
        unfinished=tuple(unfinished),
    )
    logger.info(comparison.recommend())
    return comparison


def _unfinished_row(strategy: Strategy) -> dict[str, object]:
    row = {"strategy": strategy.name, "role": strategy.role, "uses_encoder": strategy.uses_encoder}
    return {**row, "error": "KeyboardInterrupt: not finished"}


def _warn_of_interrupt(unfinished: Sequence[str], finished: Sequence[str], state: FitState | None) -> None:
    warnings.warn(
        f"Interrupted: not compared are {', '.join(unfinished)}; finished are {', '.join(finished)}, which can be used. "
        f"{_how_to_go_on(state)}",
        UserWarning,
        stacklevel=3,
    )


def _how_to_go_on(state: FitState | None) -> str:
    if state is None:
        return "A call with output_dir keeps what it has done, and the same call with resume=True goes on."
    return "The same call with resume=True goes on."


def _metrics(
    true_codes: dict[str, np.ndarray], probabilities: dict[str, np.ndarray], classes: Sequence[str] | np.ndarray
) -> dict[str, object]:
    row: dict[str, object] = {}
    notes = []
    for part in PARTS:
        if len(true_codes[part]) == 0:
            notes.append(f"{part}: no cells")
            continue
        found = classification_metrics(true_codes[part], probabilities[part], classes)
        row |= {f"{part}_{metric}": found[metric] for metric in METRICS}
        if found["auroc_note"]:
            notes.append(f"{part}: {found['auroc_note']}")
    return {**row, "auroc_note": "; ".join(notes)}


def _ranked(table: pd.DataFrame) -> pd.DataFrame:
    numbers = [column for column in TABLE_COLUMNS if column.startswith(PARTS) or column in _RANK_BY]
    table = table.astype(dict.fromkeys([*numbers, "peak_memory_mb"], float))
    table["auroc_note"] = table["auroc_note"].fillna("")
    ranked = table.assign(failed=table["error"] != "").sort_values(
        ["failed", *_RANK_BY], ascending=[True, *_RANK_BY.values()], kind="stable"
    )
    table.loc[ranked.index, "rank"] = np.arange(1, len(table) + 1)
    table["rank"] = table["rank"].astype(int)
    table["n_trainable"] = table["n_trainable"].fillna(0).astype(int)
    return table


def _warn_if_collapsed(name: str, true: np.ndarray, predicted: np.ndarray, classes: Sequence[str] | np.ndarray) -> None:
    counts = np.bincount(predicted, minlength=len(classes))
    most, largest = int(counts.argmax()), counts.max() / len(predicted)
    if largest > _COLLAPSED and (true == most).mean() <= _COLLAPSED:
        warnings.warn(
            f"Strategy {name!r} predicts {classes[most]!s} for {100 * largest:.1f} % of the validation cells, which are "
            f"of {len(np.unique(true))} classes. Check the gene overlap, the class sizes (class_weight='balanced' may "
            "help) and the learning rate.",
            UserWarning,
            stacklevel=3,
        )


def _weighted_macro_f1(true: np.ndarray, predicted: np.ndarray, weights: np.ndarray, n_classes: int) -> np.ndarray:
    """Macro-F1 of every row of ``weights`` ``[draws, kinds]``: how often each kind of cell was drawn."""
    is_true, is_predicted = np.eye(n_classes)[true], np.eye(n_classes)[predicted]
    f1 = f1_scores(weights @ (is_true * is_predicted), weights @ is_true, weights @ is_predicted)
    return np.nanmean(f1, axis=1)


def _test_only(row: pd.Series) -> str:
    return "" if np.isnan(row["test_macro_f1"]) else f" (test {row['test_macro_f1']:.3f}, for report only)"


def _test_both(best: pd.Series, baseline: pd.Series) -> str:
    if np.isnan(best["test_macro_f1"]):
        return "no test cells"
    return f"test macro-F1, for report only, {best['test_macro_f1']:.3f} against {baseline['test_macro_f1']:.3f}"
