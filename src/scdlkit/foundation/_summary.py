"""Tables of a comparison, from what every strategy did on every fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .comparison import PARTS, Outcome
from .intervals import Resampled, estimate
from .metrics import METRICS
from .plan import Fit
from .recommendation import best_of, ranks

Run = tuple[Fit, Outcome]

_SCORES = tuple(f"{part}_{metric}" for part in PARTS for metric in METRICS)
_SPREAD = tuple(f"{part}_macro_f1_{what}" for part in PARTS for what in ("sd", "low", "high"))
TABLE_COLUMNS = (
    "strategy",
    "role",
    "uses_encoder",
    "rank",
    *(
        name
        for part in PARTS
        for name in (*(x for x in _SCORES if x.startswith(part)), *(x for x in _SPREAD if x.startswith(part)))
    ),
    "auroc_note",
    "n_trainable",
    "fit_seconds",
    "peak_memory_mb",
    "n_fits",
    "error",
)
FOLD_COLUMNS = (
    "strategy", "role", "split_by", "repeat", "fold", *_SCORES, "n_trainable", "fit_seconds", "peak_memory_mb", "error",
)  # fmt: skip
HISTORY_COLUMNS = ("strategy", "repeat", "fold", "epoch", "train_loss", "val_loss", "val_macro_f1")
PER_CLASS_COLUMNS = ("strategy", "split", "class", "precision", "recall", "f1", "f1_sd", "support")
DIFFERENCE_COLUMNS = (
    "strategy", "reference", "reference_role", "split", "difference", "low", "high", "excludes_zero",
)  # fmt: skip
LEAKAGE_COLUMNS = ("strategy", "role", "split", "by_cell", "by_group", "gap", "low", "high")


def fold_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a strategy and fit, of either kind of split."""
    rows = [
        {
            "strategy": outcome.strategy,
            "role": outcome.role,
            "split_by": fit.split_by,
            "repeat": fit.repeat,
            "fold": fit.fold,
            **outcome.metrics,
            "n_trainable": outcome.n_trainable,
            "fit_seconds": outcome.fit_seconds,
            "peak_memory_mb": outcome.peak_memory_mb,
            "error": outcome.error,
        }
        for fit, outcome in runs
    ]
    return pd.DataFrame(rows, columns=list(FOLD_COLUMNS)).astype(dict.fromkeys(_SCORES, float))


def history_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row an epoch of the fits that did not fail."""
    rows = [
        {"strategy": outcome.strategy, "repeat": fit.repeat, "fold": fit.fold, **epoch}
        for fit, outcome in runs
        for epoch in outcome.history
    ]
    return pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))


def per_class_table(runs: Sequence[Run], classes: Sequence[str]) -> pd.DataFrame:
    """Means over the fits in which a value is defined; ``support`` is the mean number of cells in a fit."""
    pieces = []
    for name in _names(runs):
        of_strategy = [outcome.per_class for _, outcome in runs if outcome.strategy == name]
        for part in PARTS:
            tables = [tables[part] for tables in of_strategy if part in tables]
            if not tables:
                continue
            stacked = {
                column: np.stack([table[column].to_numpy(dtype=float) for table in tables])
                for column in ("precision", "recall", "f1", "support")
            }
            piece = pd.DataFrame({column: pd.DataFrame(values).mean() for column, values in stacked.items()})
            piece["f1_sd"] = pd.DataFrame(stacked["f1"]).std()
            pieces.append(piece.assign(strategy=name, split=part, **{"class": np.asarray(classes, dtype=object)}))
    table = pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=list(PER_CLASS_COLUMNS))
    return table[list(PER_CLASS_COLUMNS)]


def results_table(runs: Sequence[Run], resampled: Mapping[str, Resampled]) -> pd.DataFrame:
    """One row a strategy in the order they ran: means over the fits, spread, interval, cost, rank.

    A strategy that failed in any fit counts as failed: its metrics are NaN, ``n_fits`` says how many it finished.
    """
    rows = []
    for name in _names(runs):
        of_strategy = [(fit, outcome) for fit, outcome in runs if outcome.strategy == name]
        outcomes = [outcome for _, outcome in of_strategy]
        row: dict[str, Any] = {
            "strategy": name,
            "role": outcomes[0].role,
            "uses_encoder": outcomes[0].uses_encoder,
            "n_trainable": max(outcome.n_trainable for outcome in outcomes),
            "fit_seconds": np.mean([outcome.fit_seconds for outcome in outcomes]),
            "peak_memory_mb": pd.Series([outcome.peak_memory_mb for outcome in outcomes], dtype=float).max(),
            "n_fits": sum(not outcome.error for outcome in outcomes),
            "error": _error(of_strategy),
            "auroc_note": _note(outcomes),
        }
        if not row["error"]:
            # an AUROC may be undefined in some fits: the mean is over the others, and the note says so
            scores = pd.DataFrame([outcome.metrics for outcome in outcomes], columns=list(_SCORES), dtype=float)
            row |= dict(zip(_SCORES, scores.mean(), strict=True))
            for part, found in resampled.items():
                interval = found.score(name)
                row[f"{part}_macro_f1_sd"] = scores[f"{part}_macro_f1"].std()
                row |= {f"{part}_macro_f1_low": interval.low, f"{part}_macro_f1_high": interval.high}
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
    table = table.astype(dict.fromkeys([*_SCORES, *_SPREAD, "fit_seconds", "peak_memory_mb"], float))
    table["rank"] = ranks(table)
    return table


def difference_table(table: pd.DataFrame, resampled: Mapping[str, Resampled], best: str) -> pd.DataFrame:
    """Every strategy against the best baseline and against the best strategy, on the same cells of the same fits."""
    references = {best_of(table, "baseline"): "baseline"}
    references.setdefault(best, "best")
    finished = table[table["error"] == ""].sort_values("rank")["strategy"]
    rows = []
    for reference, role in references.items():
        for part, found in resampled.items():
            for name in finished:
                if not reference or name == reference:
                    continue
                against = found.difference(name, reference)
                rows.append(
                    (name, reference, role, part, against.value, against.low, against.high, against.excludes_zero)
                )
    return pd.DataFrame(rows, columns=list(DIFFERENCE_COLUMNS)).astype({"excludes_zero": bool})


def leakage_table(
    table: pd.DataFrame, by_group: Mapping[str, Resampled], by_cell: Mapping[str, Resampled]
) -> pd.DataFrame:
    """What every strategy seems to gain where cells of one group may be on both sides of the split.

    The two scores are of different cells, so they are resampled on their own; NaN for strategies that failed.
    """
    rows = []
    ranked = table.sort_values("rank")
    for name, role in zip(ranked["strategy"].astype(str), ranked["role"], strict=True):
        for part in PARTS:
            entry: dict[str, Any] = {"strategy": name, "role": role, "split": part}
            cell, group = by_cell.get(part), by_group.get(part)
            if cell is not None and name in cell.scores:
                entry["by_cell"] = cell.scores[name]
            if group is not None and name in group.scores:
                entry["by_group"] = group.scores[name]
            if cell is not None and group is not None and {"by_cell", "by_group"} <= set(entry):
                draws = cell.draws[name] - group.draws[name]
                gap = estimate(entry["by_cell"] - entry["by_group"], draws)
                entry |= {"gap": gap.value, "low": gap.low, "high": gap.high}
            rows.append(entry)
    return pd.DataFrame(rows, columns=list(LEAKAGE_COLUMNS)).astype(dict.fromkeys(LEAKAGE_COLUMNS[3:], float))


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(outcome.strategy for _, outcome in runs))


def _error(runs: Sequence[Run]) -> str:
    """The first error, and in how many of several fits there was one."""
    failed = [(fit, outcome) for fit, outcome in runs if outcome.error]
    if not failed:
        return ""
    fit, outcome = failed[0]
    if len(runs) == 1:
        return outcome.error
    return f"{len(failed)} of {len(runs)} fits failed, first repeat {fit.repeat} fold {fit.fold}: {outcome.error}"


def _note(outcomes: Sequence[Outcome], most: int = 3) -> str:
    counts = Counter(note for outcome in outcomes for note in outcome.notes)
    if len(outcomes) == 1:
        return "; ".join(counts)
    notes = [f"{note} ({times} of {len(outcomes)} fits)" for note, times in counts.most_common(most)]
    return "; ".join(notes) + (f"; {len(counts) - most} more" if len(counts) > most else "")
