from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from scdlkit import pl


def _report(**changes):
    fields = {
        "checkpoint": "whole-human",
        "n_genes": 1000,
        "n_matched": 913,
        "overlap": 0.913,
        "matched_how": {"ensembl": 10, "symbol": 900, "case": 3},
        "genes_per_cell": {"min": 10, "q25": 200, "median": 310.5, "q75": 400, "max": 800},
        "max_length": 500,
        "share_above_max_length": 0.125,
    }
    return SimpleNamespace(**(fields | changes))


def test_bars_are_the_genes_and_box_the_quartiles():
    ax = pl.gene_overlap(_report(), show=False)
    upper, lower = ax.figure.axes
    assert [bar.get_width() for bar in upper.patches] == [900, 3, 10, 87]
    assert [bar.get_x() for bar in upper.patches] == [0, 900, 903, 913]
    names = [text.get_text() for text in upper.get_legend().get_texts()]
    assert names == ["by symbol: 900", "by symbol, other case: 3", "by Ensembl id: 10", "unknown: 87"]
    (box,) = lower.patches
    assert (box.get_x(), box.get_width()) == (200, 200)
    assert lower.lines[0].get_xdata()[0] == 500
    assert "12.5% of cells do not fit" in lower.texts[0].get_text()
    assert ax.get_title(loc="left") == "913 of 1,000 genes (91.3%) known to 'whole-human'"
    plt.close(ax.figure)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_matched": 0, "overlap": 0.0, "matched_how": {}, "share_above_max_length": 0.0},
        {"n_matched": 1000, "overlap": 1.0, "matched_how": {"symbol": 1000}, "max_length": 1200},
        {"genes_per_cell": dict.fromkeys(("min", "q25", "median", "q75", "max"), 0)},
        {"matched_how": {"symbol": 900, "var['gene_ids']: ensembl": 13}},
    ],
)
def test_extremes(changes, tmp_path):
    pl.gene_overlap(_report(**changes), save=tmp_path / "a.png")


def test_not_a_report():
    with pytest.raises(TypeError, match="inspect_annotation_data.*found dict without checkpoint, n_genes"):
        pl.gene_overlap({})
