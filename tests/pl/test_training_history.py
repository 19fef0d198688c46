from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from scdlkit import get, pl


def test_lines_and_best_epochs(forty):
    ax = pl.training_history(forty, show=False)
    upper, lower = ax.figure.axes
    history = get.history(forty)
    assert [line.get_label() for line in upper.lines] == [
        name for name in get.strategy_table(forty)["strategy"] if (history["strategy"] == name).any()
    ]
    rings = [np.asarray(c.get_offsets())[0] for c in upper.collections if isinstance(c, PathCollection)]
    for line, loss, ring in zip(upper.lines, lower.lines, rings, strict=True):
        rows = history[history["strategy"] == line.get_label()]
        np.testing.assert_array_equal(line.get_ydata(), rows["val_macro_f1"])
        np.testing.assert_array_equal(loss.get_ydata(), rows["train_loss"])
        best = rows.loc[rows["val_macro_f1"].idxmax()]
        np.testing.assert_array_equal(ring, [best["epoch"], best["val_macro_f1"]])
    looks = {(line.get_color(), line.get_marker()) for line in upper.lines}
    assert len(looks) == len(upper.lines) == 7
    plt.close(ax.figure)


def test_chosen_strategies_and_fits_without_epochs(make_annotated):
    adata = make_annotated(3)
    result = adata.uns["scgpt"]
    probe = {"strategy": "frozen_probe", "epoch": 0, "train_loss": 0.1, "val_loss": 0.2, "val_macro_f1": 0.8}
    result["history"] = pd.concat([result["history"], pd.DataFrame([probe])], ignore_index=True)
    ax = pl.training_history(adata, show=False)
    assert "frozen_probe" not in [line.get_label() for line in ax.lines]
    plt.close(ax.figure)
    ax = pl.training_history(adata, strategies=["head", "lora"], show=False)
    assert [line.get_label() for line in ax.lines] == ["head", "lora"]
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="strategies 'frozen_probe' have no training history; with epochs: lora"):
        pl.training_history(adata, strategies="frozen_probe")


def test_equal_scores_are_told_apart_by_the_loss(make_annotated):
    adata = make_annotated(3)
    adata.uns["scgpt"]["history"] = pd.DataFrame(
        {
            "strategy": "head",
            "epoch": [1, 2, 3, 4, 5],
            "train_loss": 1.0,
            "val_loss": [0.1, 0.5, 0.4, 0.4, 0.0],
            "val_macro_f1": [0.8, 0.9, 0.9, 0.9, np.nan],
        }
    )
    ax = pl.training_history(adata, show=False)
    (ring,) = [np.asarray(c.get_offsets())[0] for c in ax.collections if isinstance(c, PathCollection)]
    np.testing.assert_array_equal(ring, [3, 0.9])
    plt.close(ax.figure)


def test_one_epoch_many_epochs_and_nan(make_annotated, tmp_path):
    adata = make_annotated(3)
    result = adata.uns["scgpt"]
    many = np.arange(1, 201)
    result["history"] = pd.DataFrame(
        {
            "strategy": ["head"] + ["lora"] * 200,
            "epoch": [1, *many],
            "train_loss": [1.0, *(1 / many)],
            "val_loss": np.nan,
            "val_macro_f1": [np.nan, *(many / 201)],
        }
    )
    pl.training_history(adata, save=tmp_path / "a.png")


def test_no_epochs_at_all(make_annotated):
    adata = make_annotated(3)
    adata.uns["scgpt"]["history"] = adata.uns["scgpt"]["history"].head(0)
    with pytest.raises(ValueError, match="no strategy here has no training history|with epochs: none"):
        pl.training_history(adata)
