from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PathCollection

from scdlkit import get, pl
from scdlkit.pl._strategy_tradeoff import pareto_front

_FEW = st.integers(0, 4)  # few values, so that ties are common


@given(st.lists(st.tuples(_FEW, _FEW), min_size=1, max_size=10))
def test_pareto_front_against_the_definition(points):
    costs, scores = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    expected = [
        i
        for i, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    ]
    assert list(pareto_front(costs, scores)) == expected


def _drawn(ax):
    points = [c for c in ax.collections if isinstance(c, PathCollection)]
    xy = np.array([np.asarray(c.get_offsets())[0] for c in points])
    filled = [not np.allclose(c.get_facecolor()[0], 1) for c in points]
    return xy, filled


@pytest.mark.parametrize("cost", ["n_trainable", "fit_seconds", "peak_memory_mb"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_points_and_front(three, cost, split):
    ax = pl.strategy_tradeoff(three, cost=cost, split=split, show=False)
    table = get.strategy_table(three).dropna(subset=[cost, f"{split}_macro_f1"])
    xy, filled = _drawn(ax)
    np.testing.assert_allclose(xy, table[[cost, f"{split}_macro_f1"]])
    front = set(pareto_front(xy[:, 0], xy[:, 1]))
    assert [i in front for i in range(len(xy))] == filled
    assert ax.get_xscale() == "log"
    assert {text.get_text() for text in ax.texts} - {""} == set(table["strategy"])
    (line,) = [line for line in ax.lines if line.get_label() == "Pareto front"]
    assert (np.diff(line.get_ydata()) >= 0).all() and (np.diff(line.get_xdata()) >= 0).all()
    plt.close(ax.figure)


@pytest.mark.parametrize("costs", ["some zero", "all zero"])
def test_zero_cost_has_a_place(make_annotated, costs, tmp_path):
    adata = make_annotated(3)
    table = adata.uns["scgpt"]["strategies"]
    table.loc[table["strategy"] == "frozen_probe" if costs == "some zero" else slice(None), "n_trainable"] = 0
    ax = pl.strategy_tradeoff(adata, save=tmp_path / "a.png", show=False)
    place = ax.transData.transform((0, 0.83))[0]
    frame = ax.get_window_extent()
    assert frame.x0 < place < frame.x1
    assert ax.get_xticks()[0] == 0
    plt.close(ax.figure)


def test_same_scores_and_one_point(make_annotated, tmp_path):
    adata = make_annotated(3)
    adata.uns["scgpt"]["strategies"]["val_macro_f1"] = 0.9
    pl.strategy_tradeoff(adata, save=tmp_path / "a.png")
    adata.uns["scgpt"]["strategies"] = adata.uns["scgpt"]["strategies"].head(1)
    pl.strategy_tradeoff(adata, save=tmp_path / "b.png")


def test_errors(make_annotated):
    adata = make_annotated(3)
    with pytest.raises(ValueError, match="cost must be one of 'n_trainable', 'fit_seconds'.*found 'dollars'"):
        pl.strategy_tradeoff(adata, cost="dollars")
    with pytest.raises(ValueError, match="split must be 'val' or 'test', found 'train'"):
        pl.strategy_tradeoff(adata, split="train")
    adata.uns["scgpt"]["strategies"]["val_macro_f1"] = np.nan
    with pytest.raises(ValueError, match="no strategy has both val_macro_f1 and n_trainable"):
        pl.strategy_tradeoff(adata)
