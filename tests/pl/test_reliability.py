from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from scdlkit import get, pl


def _cells(adata, split="test"):
    cells = get.predictions(adata, split=split)
    return cells[cells["confidence"].notna()]


@pytest.mark.parametrize("n_bins", [5, 10])
def test_points_against_sklearn(forty, n_bins):
    cells = _cells(forty)
    correct = cells["true"] == cells["predicted"]
    accuracy, confidence = calibration_curve(correct, cells["confidence"], n_bins=n_bins)
    ax = pl.reliability(forty, n_bins=n_bins, show=False)
    upper, lower = ax.figure.axes
    (points,) = [line for line in upper.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points.get_xdata(), confidence)
    np.testing.assert_allclose(points.get_ydata(), accuracy)
    counts, _ = np.histogram(cells["confidence"], bins=np.linspace(0, 1, n_bins + 1))
    assert [bar.get_height() for bar in lower.patches] == list(counts)
    error = np.sum(counts[counts > 0] * np.abs(accuracy - confidence)) / counts.sum()
    assert ax.get_title(loc="left") == f"Reliability of lora, ECE {error:.3f}\n{len(cells):,} test cells"
    plt.close(ax.figure)


def test_intervals_are_wilson(three):
    ax = pl.reliability(three, show=False)
    upper, lower = ax.figure.axes
    (points,) = [line for line in upper.lines if line.get_marker() == "o"]
    segments = upper.collections[0].get_segments()
    cells = [int(bar.get_height()) for bar in lower.patches if bar.get_height()]
    for accuracy, n, segment in zip(points.get_ydata(), cells, segments, strict=True):
        interval = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
        np.testing.assert_allclose(segment[:, 1], [interval.low, interval.high], atol=1e-6)
    plt.close(ax.figure)


def test_title_of_training_cells(three):
    ax = pl.reliability(three, split="train", show=False)
    assert "no measure of quality" in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_nothing_but_unassigned(make_annotated):
    adata = make_annotated(3)
    adata.obs["scgpt_label_confidence"] = np.nan
    with pytest.raises(ValueError, match="no labelled cell with split='test' has a confidence"):
        pl.reliability(adata)
