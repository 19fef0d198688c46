"""Sections of the report on how sure a comparison is, as lines of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scdlkit.runner import AnnotationRunner


def sureness(runner: AnnotationRunner) -> list[str]:
    """Intervals, paired differences and, where it was measured, the leakage gap."""
    return [*_intervals(runner), *_differences(runner), *_leakage(runner)]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows),
    ]


def escape(text: object) -> str:
    """Text for a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _intervals(runner: AnnotationRunner) -> list[str]:
    config, results = runner.config, runner.results_
    n_fits = config.plan.n_fits
    folds = f"{config.cv} folds" if config.cv else "one split"
    repeats = f", {config.n_repeats} times" if config.n_repeats > 1 else ""
    by = f"whole values of `{config.group_key}`" if config.group_key else "cells"
    columns = [[f"{part}_macro_f1{what}" for what in ("", "_low", "_high", "_sd")] for part in ("val", "test")]
    rows = [
        [
            row["strategy"],
            *(_score(*(row[name] for name in names)) for names in columns),
            f"{row['n_fits']} of {n_fits}",
        ]
        for row in results.to_dict("records")
    ]
    return [
        "## How sure is it",
        "",
        f"Split by {by}, {folds}{repeats}: {n_fits} fit{'s' if n_fits > 1 else ''} of each strategy. Macro-F1, "
        "mean over the fits, with its 95 % interval over fits and cells"
        + (" and the standard deviation over the fits." if n_fits > 1 else "."),
        "",
        *table(["strategy", "validation", "test", "fits that finished"], rows),
        "",
    ]


def _differences(runner: AnnotationRunner) -> list[str]:
    found = runner.differences_
    found = found[found["split"] == "test"]
    if not len(found):
        return []
    rows = [
        [
            row["strategy"],
            f"{row['reference']} ({'best baseline' if row['reference_role'] == 'baseline' else 'best strategy'})",
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            "yes" if row["excludes_zero"] else "no",
        ]
        for row in found.to_dict("records")
    ]
    return [
        "Difference of the test macro-F1, on the same cells of the same fits, with its 95 % interval:",
        "",
        *table(["strategy", "against", "difference", "excludes 0"], rows),
        "",
    ]


def _leakage(runner: AnnotationRunner) -> list[str]:
    found = runner.leakage_
    found = found[found["split"] == "test"]
    if not len(found):
        return []
    rows = [
        [row["strategy"], _score(row["by_cell"]), _score(row["by_group"]), _score(row["gap"], row["low"], row["high"])]
        for row in found.to_dict("records")
    ]
    return [
        f"Leakage: what a split by cell would have shown, where cells of one value of `{runner.config.group_key}` are "
        "on both sides (test macro-F1, gap with its 95 % interval). All other scores here are those by group.",
        "",
        *table(["strategy", "by cell", "by group", "gap"], rows),
        "",
    ]


def _score(value: float, low: float = np.nan, high: float = np.nan, sd: float = np.nan) -> str:
    if np.isnan(value):
        return "–"
    interval = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
    return f"{value:.3f}{interval}" + ("" if np.isnan(sd) else f", sd {sd:.3f}")
