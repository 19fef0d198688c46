from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from scdlkit import get, pl
from scdlkit.pl._style import GREY


def _points(ax):
    """Drawn points of validation and of test."""
    return [np.asarray(c.get_offsets().filled(np.nan)) for c in ax.collections if isinstance(c, PathCollection)]


def _bars(ax):
    """Ends of the drawn bars of validation and of test, ``[strategies, 2]`` each."""
    return [
        np.array([segment[:, 0] for segment in c.get_segments() if len(segment)])  # none where it failed
        for c in ax.collections
        if isinstance(c, LineCollection)
    ]


@pytest.mark.parametrize("metric", ["macro_f1", "mcc"])
@pytest.mark.parametrize("result", ["three", "older"])
def test_points_are_the_scores_by_rank(request, result, metric):
    adata = request.getfixturevalue(result)
    ax = pl.strategy_comparison(adata, metric=metric, show=False)
    table = get.strategy_table(adata)
    validation, test = _points(ax)
    np.testing.assert_array_equal(validation[:, 0], table[f"val_{metric}"])
    np.testing.assert_array_equal(test[:, 0], table[f"test_{metric}"])
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert [label.removesuffix(" (baseline)") for label in labels] == list(table["strategy"])
    assert ax.yaxis_inverted()
    assert ("interval" in ax.get_title(loc="left")) == (result == "three" and metric == "macro_f1")
    plt.close(ax.figure)


def test_bars_are_the_intervals(three_often):
    ax = pl.strategy_comparison(three_often, show=False)
    table = get.strategy_table(three_often)
    finished = table[table["error"] == ""]
    for bars, part in zip(_bars(ax), ("val", "test"), strict=True):
        np.testing.assert_array_equal(bars, finished[[f"{part}_macro_f1_low", f"{part}_macro_f1_high"]])
    validation, test = _points(ax)
    drawn = np.isfinite(validation[:, 0])
    assert (validation[drawn, 1] < test[drawn, 1]).all()  # one above the other, so that bars do not cover each other
    assert ax.get_title(loc="left").endswith("means of 5 fits; bars: 95 % intervals")
    low, high = ax.get_xlim()
    assert low < finished["val_macro_f1_low"].min() and high > finished["val_macro_f1_high"].max()
    plt.close(ax.figure)
    ax = pl.strategy_comparison(three_often, metric="mcc", show=False)  # has none
    assert ax.get_title(loc="left").endswith("\nmeans of 5 fits")
    plt.close(ax.figure)


def test_dashed_line_is_the_best_baseline_without_the_foundation_model(make_annotated, three_often):
    adata = three_often.copy()
    table = adata.uns["scgpt"]["strategies"]
    table.loc[table["strategy"] == "knn_frozen", ["val_macro_f1", "test_macro_f1"]] = 0.99
    ax = pl.strategy_comparison(adata, show=False)
    scores = table.set_index("strategy")
    (dashed,) = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed == scores.loc["logreg_genes", "test_macro_f1"]
    (band,) = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_alpha()]
    assert band.get_x() == scores.loc["logreg_genes", "test_macro_f1_low"]
    assert band.get_x() + band.get_width() == pytest.approx(scores.loc["logreg_genes", "test_macro_f1_high"])
    plt.close(ax.figure)
    table["uses_encoder"] = True
    ax = pl.strategy_comparison(adata, show=False)
    assert not [line for line in ax.lines if line.get_linestyle() == "--"]
    assert "best baseline, test" not in [text.get_text() for text in ax.get_legend().get_texts()]
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


def test_unknown_metric(three, three_often):
    for adata in (three, three_often):
        with pytest.raises(ValueError, match="metric must be one of 'macro_f1', 'accuracy'.*'auroc_ovr', found 'f1'"):
            pl.strategy_comparison(adata, metric="f1")
