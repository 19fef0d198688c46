from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scdlkit.foundation.intervals import Resampled
from scdlkit.foundation.recommendation import best_of, ranks, recommend, simplest

# score, trained parameters, role, whether it uses the encoder
ROWS = {
    "lora": (0.90, 500, "strategy", True),
    "head": (0.89, 300, "strategy", True),
    "frozen_probe": (0.85, 100, "strategy", True),
    "knn_frozen": (0.84, 0, "baseline", True),
    "pca_logreg": (0.80, 50, "baseline", False),
    "logreg_genes": (0.79, 900, "baseline", False),
}


def make(scores: dict[str, float], error: float = 0.02, failed: tuple[str, ...] = ()) -> tuple[pd.DataFrame, Resampled]:
    """Strategies with these scores, and resamples in which each difference has about the standard error ``error``."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [(name, *ROWS[name], "no luck" if name in failed else "") for name in scores],
        columns=["strategy", "val_macro_f1", "n_trainable", "role", "uses_encoder", "error"],
    )
    table["val_macro_f1"] = list(scores.values())
    table["val_balanced_accuracy"] = table["val_accuracy"] = 0.5
    table["fit_seconds"] = 1.0
    table["rank"] = ranks(table)
    noise = rng.normal(scale=error / np.sqrt(2), size=(len(scores), 4000))
    noise -= noise.mean(1, keepdims=True)
    used = {name: score for name, score in scores.items() if name not in failed}
    draws = {name: score + noise[i] for i, (name, score) in enumerate(scores.items()) if name in used}
    return table, Resampled(used, draws)


def scores(*names: str, **changed: float) -> dict[str, float]:
    return {name: changed.get(name, ROWS[name][0]) for name in names or ROWS}


def test_ranks_by_validation_then_size_then_time_and_failures_last() -> None:
    table, _ = make(scores("head", "lora", "frozen_probe", "pca_logreg", lora=0.89), failed=("frozen_probe",))
    assert table["rank"].tolist() == [1, 2, 4, 3]
    table["val_accuracy"] = [0.1, 0.2, 0.9, 0.1]
    assert ranks(table).tolist() == [2, 1, 4, 3]
    equal = table.assign(val_macro_f1=0.5, val_accuracy=0.5, n_trainable=1, fit_seconds=[4, 3, 2, 1])
    assert ranks(equal).tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(0.005, "lora"), (0.02, "head"), (0.055, "frozen_probe"), (0.08, "knn_frozen"), (0.2, "pca_logreg")],
)
def test_the_simplest_within_one_standard_error(error: float, expected: str) -> None:
    """The error of a difference decides: 0.01, 0.05, 0.06 and 0.1 lie between these."""
    assert simplest(*make(scores(), error)) == expected


def test_fewer_parameters_then_less_time_are_simpler() -> None:
    table, resampled = make(scores("lora", "head", "frozen_probe", frozen_probe=0.895))
    assert simplest(table, resampled) == "frozen_probe"
    table["n_trainable"], table["fit_seconds"] = 7, [1.0, 0.5, 2.0]
    assert simplest(table, resampled) == "head"


def test_a_baseline_in_the_set_means_not_worth_it() -> None:
    text = recommend(*make(scores(pca_logreg=0.895)))
    assert text.startswith(
        "The foundation model is not worth it here: the baseline pca_logreg (validation macro-F1 0.895)"
    )
    assert "within one standard error of the best, lora with 0.900 (difference 0.005, standard error 0.02" in text
    text = recommend(*make(scores(logreg_genes=0.95)))
    assert "not worth it here: the baseline logreg_genes (validation macro-F1 0.950) is best, ahead of lora" in text
    assert text.endswith(".") and text.count(". ") == 0


def test_a_strategy_ahead_of_the_baselines() -> None:
    text = recommend(*make(scores()))
    assert text.startswith("Use head (validation macro-F1 0.890), the simplest within")
    assert "within one standard error of the best, lora with 0.900" in text
    assert "ahead of the baseline pca_logreg, 0.800, by more than one standard error (difference 0.100" in text
    text = recommend(*make(scores("lora", "pca_logreg")))
    assert text.startswith("Use lora (validation macro-F1 0.900): nothing simpler is within one standard error of it")


def test_a_baseline_on_the_embedding_says_nothing_against_the_foundation_model() -> None:
    text = recommend(*make(scores("lora", "knn_frozen", "pca_logreg", knn_frozen=0.95)))
    assert text.startswith("Use knn_frozen") and "not worth it" not in text
    text = recommend(*make(scores("lora", "knn_frozen")))
    assert text.endswith("no baseline without the foundation model finished, so whether it is worth it here is open.")


def test_failed_ones_are_left_out() -> None:
    text = recommend(*make(scores("lora", "head", "pca_logreg"), failed=("lora",)))
    assert "head" in text and "lora" not in text
    text = recommend(*make(scores("lora", "pca_logreg"), failed=("lora",)))
    assert text.startswith("No strategy but the baseline pca_logreg finished")


def test_best_of_a_role() -> None:
    table, _ = make(scores(), failed=("lora",))
    assert best_of(table, "strategy") == "head"
    assert best_of(table, "baseline") == "pca_logreg"  # though knn_frozen ranks before it
    assert best_of(table[table["strategy"] == "knn_frozen"], "baseline") == "knn_frozen"
    assert best_of(table[table["role"] == "baseline"], "strategy") == ""
