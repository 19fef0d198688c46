from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scdlkit import get, pl


@pytest.mark.parametrize("split", ["val", "test"])
def test_lines_and_bands(three_often, split):
    ax = pl.label_efficiency(three_often, split=split, show=False)
    table = get.label_efficiency(three_often)
    assert ax.get_xscale() == "log"
    lines = {line.get_label().partition("\n")[0]: line for line in ax.lines}
    assert set(lines) == set(table["strategy"])
    bands = dict(zip(lines, ax.collections, strict=True))
    for name, line in lines.items():
        rows = table[table["strategy"] == name].sort_values("fraction")
        np.testing.assert_array_equal(line.get_xdata(), rows["n_labelled"])
        np.testing.assert_array_equal(line.get_ydata(), rows[f"{split}_macro_f1"])
        corners = bands[name].get_datalim(ax.transData)
        assert corners.y0 == rows[f"{split}_macro_f1_low"].min()
        assert corners.y1 == rows[f"{split}_macro_f1_high"].max()
    assert [name for name, line in lines.items() if line.get_linestyle() == "--"] == ["pca_logreg"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "1,190\n100 %", "595\n50 %", "119\n10 %", "60\n5 %", "12\n1 %",
    ]  # fmt: skip
    plt.close(ax.figure)


def test_legend_goes_by_the_last_score_and_names_failures(three_often):
    ax = pl.label_efficiency(three_often, show=False)
    last = get.label_efficiency(three_often).query("fraction == 1").set_index("strategy")["test_macro_f1"]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [name.partition("\n")[0] for name in names] == list(last.sort_values(ascending=False).index)
    assert [name for name in names if "failed" in name] == ["head\n(failed at 5 %)"]
    plt.close(ax.figure)


def test_metric_without_intervals_and_crowded_shares(three_often):
    ax = pl.label_efficiency(three_often, metric="accuracy", show=False)
    assert "interval" not in ax.get_title(loc="left")
    assert ax.get_ylabel() == "accuracy, test cells"
    plt.close(ax.figure)
    adata = three_often.copy()
    table = adata.uns["scgpt_label_efficiency"]["efficiency"]
    table.loc[table["fraction"] == 0.05, "n_labelled"] = 13
    ax = pl.label_efficiency(adata, show=False)
    assert "12\n1 %" not in [tick.get_text() for tick in ax.get_xticklabels()]
    plt.close(ax.figure)


def test_one_share(three_often, tmp_path):
    adata = three_often.copy()
    result = adata.uns["scgpt_label_efficiency"]
    result["efficiency"] = result["efficiency"].query("fraction == 1")
    pl.label_efficiency(adata, save=tmp_path / "a.png")


def test_errors(three, three_often):
    with pytest.raises(KeyError, match=r"holds no such result. Run sk.tl.label_efficiency\(adata"):
        pl.label_efficiency(three)
    with pytest.raises(KeyError, match="stored under: 'scgpt_label_efficiency'; .*key_added='mine'"):
        pl.label_efficiency(three_often, key="mine")
    with pytest.raises(ValueError, match="metric must be one of 'macro_f1', 'accuracy', found 'mcc'"):
        pl.label_efficiency(three_often, metric="mcc")
    with pytest.raises(ValueError, match="split must be 'val' or 'test', found 'train'"):
        pl.label_efficiency(three_often, split="train")
    adata = three_often.copy()
    table = adata.uns["scgpt_label_efficiency"]["efficiency"]
    table[["test_macro_f1", "error"]] = np.nan, "no luck"
    with pytest.raises(ValueError, match="no strategy has test_macro_f1 at any share of the labels"):
        pl.label_efficiency(adata)
