"""Rank strategies by validation, and say in a sentence which one to use. Test figures do not come in here."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .intervals import Resampled

# Ranking: validation alone, then the smaller model, then the faster one.
RANK_BY = {
    "val_macro_f1": False,
    "val_balanced_accuracy": False,
    "val_accuracy": False,
    "n_trainable": True,
    "fit_seconds": True,
}


def ranks(table: pd.DataFrame) -> np.ndarray:
    """Rank of every row, from 1; those with an error come last."""
    order = table.assign(failed=table["error"] != "").sort_values(
        ["failed", *RANK_BY], ascending=[True, *RANK_BY.values()], kind="stable"
    )
    position = pd.Series(np.arange(1, len(table) + 1), index=order.index)
    return position.loc[table.index].to_numpy(dtype=int)


def best_of(table: pd.DataFrame, role: str) -> str:
    """Best-ranked row of a role that did not fail; empty if there is none.

    Among baselines one without the foundation model goes before one that reads the encoder's embedding, which says
    nothing against the foundation model.
    """
    rows = table[(table["role"] == role) & (table["error"] == "")]
    if len(rows) == 0:
        return ""
    first = ["uses_encoder", "rank"] if role == "baseline" else ["rank"]
    return str(rows.sort_values(first)["strategy"].iloc[0])


def simplest(table: pd.DataFrame, resampled: Resampled) -> str:
    """The simplest strategy within one standard error of the best by validation (the one-standard-error rule).

    The error is that of the paired difference to the best-ranked one, baselines included (Breiman et al. 1984 take the
    error of the best score alone, which is larger). Simpler is a baseline, first one without the encoder, then fewer
    trained parameters, then less time.

    Parameters
    ----------
    table
        strategy, role, uses_encoder, rank, n_trainable, fit_seconds, error; at least one without an error.
    resampled
        On the validation cells, all strategies without an error.
    """
    rows = table[table["error"] == ""].sort_values("rank")
    top = str(rows["strategy"].iloc[0])
    behind = [resampled.difference(top, str(name)) for name in rows["strategy"]]
    near = rows[[found.value <= found.error for found in behind]]
    near = near.assign(adapted=near["role"] != "baseline")
    return str(near.sort_values(["adapted", "uses_encoder", "n_trainable", "fit_seconds", "rank"])["strategy"].iloc[0])


def recommend(table: pd.DataFrame, resampled: Resampled) -> str:
    """One sentence: :func:`simplest`, and whether the foundation model is worth it. Parameters as there."""
    rows = table[table["error"] == ""].sort_values("rank").set_index("strategy")
    if not (rows["role"] == "strategy").any():
        return f"No strategy but the baseline {rows.index[0]} finished, so there is nothing to recommend it against."
    top, pick = str(rows.index[0]), simplest(table, resampled)
    is_plain = (rows["role"] == "baseline") & ~rows["uses_encoder"].astype(bool)
    if is_plain[pick]:
        strategy = best_of(table, "strategy")
        if pick == top:
            behind = resampled.difference(pick, strategy)
            return (
                f"The foundation model is not worth it here: the baseline {_reached(pick, rows)} is best, ahead of "
                f"{_reached(strategy, rows)} (difference {behind.value:.3f}, standard error {behind.error:.3f})."
            )
        near = _near(pick, top, rows, resampled)
        return f"The foundation model is not worth it here: the baseline {_reached(pick, rows)} is {near}."
    if pick == top:
        use = f"Use {_reached(pick, rows)}: nothing simpler is within one standard error of it"
    else:
        use = f"Use {_reached(pick, rows)}, {_near(pick, top, rows, resampled)}"
    if not is_plain.any():
        return f"{use}; no baseline without the foundation model finished, so whether it is worth it here is open."
    baseline = str(rows.index[is_plain][0])
    ahead = resampled.difference(top, baseline)
    return (
        f"{use}; the foundation model is ahead of the baseline {baseline}, {rows['val_macro_f1'][baseline]:.3f}, by "
        f"more than one standard error (difference {ahead.value:.3f}, standard error {ahead.error:.3f})."
    )


def _reached(name: str, rows: pd.DataFrame) -> str:
    return f"{name} (validation macro-F1 {rows['val_macro_f1'][name]:.3f})"


def _near(name: str, top: str, rows: pd.DataFrame, resampled: Resampled) -> str:
    behind = resampled.difference(top, name)
    return (
        f"the simplest within one standard error of the best, {top} with "
        f"{rows['val_macro_f1'][top]:.3f} (difference {behind.value:.3f}, standard error {behind.error:.3f})"
    )
