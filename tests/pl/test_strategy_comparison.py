from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from scdlkit import get, pl
from scdlkit.pl._style import GREY


def _points(ax):
    """Drawn points of validation and of test."""
    return [np.asarray(c.get_offsets().filled(np.nan)) for c in ax.collections if isinstance(c, PathCollection)]


@pytest.mark.parametrize("metric", ["macro_f1", "mcc"])
def test_points_are_the_scores_by_rank(three, metric):
    ax = pl.strategy_comparison(three, metric=metric, show=False)
    table = get.strategy_table(three)
    validation, test = _points(ax)
    np.testing.assert_array_equal(validation[:, 0], table[f"val_{metric}"])
    np.testing.assert_array_equal(test[:, 0], table[f"test_{metric}"])
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert [label.removesuffix(" (baseline)") for label in labels] == list(table["strategy"])
    assert ax.yaxis_inverted()
    plt.close(ax.figure)


def test_baseline_chosen_and_failed_are_marked(three):
    ax = pl.strategy_comparison(three, show=False)
    ticks = {tick.get_text(): tick for tick in ax.get_yticklabels()}
    assert to_hex(ticks["pca_logreg (baseline)"].get_color()) == GREY.lower()
    assert [name for name, tick in ticks.items() if tick.get_fontweight() == "bold"] == ["lora"]
    table = get.strategy_table(three).set_index("strategy")
    dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == [table.loc["pca_logreg", "test_macro_f1"]]
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == 1
    texts = [text.get_text() for text in ax.texts]
    assert f"{table.loc['lora', 'test_macro_f1']:.3f}" in texts
    assert any(text.startswith("failed: ValueError: loss is NaN") for text in texts)
    plt.close(ax.figure)


@pytest.mark.parametrize("value", [1.0, 0.0, np.nan])
def test_equal_or_missing_scores(make_annotated, value, tmp_path):
    adata = make_annotated(3)
    table = adata.uns["scgpt"]["strategies"]
    table[["val_macro_f1", "test_macro_f1"]] = value
    ax = pl.strategy_comparison(adata, save=tmp_path / "a.png", show=False)
    low, high = ax.get_xlim()
    assert high - low >= 0.08 - 1e-9 and high <= 1.02
    plt.close(ax.figure)


def test_one_strategy_without_baseline(make_annotated, tmp_path):
    adata = make_annotated(3)
    adata.uns["scgpt"]["strategies"] = adata.uns["scgpt"]["strategies"].head(1)
    pl.strategy_comparison(adata, save=tmp_path / "a.png")


def test_unknown_metric(three):
    with pytest.raises(ValueError, match="metric must be one of 'macro_f1', 'accuracy'.*found 'f1'"):
        pl.strategy_comparison(three, metric="f1")
