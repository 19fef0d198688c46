from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import PathCollection

from scdlkit import get, pl
from scdlkit.pl._style import signed


@pytest.mark.parametrize("split", ["val", "test"])
def test_both_scores_and_the_gap(three_often, split):
    ax = pl.leakage_gap(three_often, split=split, show=False)
    gaps = three_often.uns["scgpt"]["leakage"]
    gaps = gaps[gaps["split"] == split].dropna(subset="gap").set_index("strategy")
    ranked = [name for name in get.strategy_table(three_often)["strategy"] if name in gaps.index]
    by_cell, by_group = (c.get_offsets()[:, 0] for c in ax.collections if isinstance(c, PathCollection))
    np.testing.assert_array_equal(np.asarray(by_cell), gaps.loc[ranked, "by_cell"])
    np.testing.assert_array_equal(np.asarray(by_group), gaps.loc[ranked, "by_group"])
    texts = [text.get_text() for text in ax.texts]
    for name, text in zip(ranked, texts, strict=True):
        row = gaps.loc[name]
        assert text == f"{signed(row['gap'])}  [{signed(row['low'], 2)}, {signed(row['high'], 2)}]"
    assert "ia3" not in ranked  # it failed
    assert "donor" in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_results_without_groups(three, three_often):
    with pytest.raises(KeyError, match="has no 'leakage': it is measured with a group_key"):
        pl.leakage_gap(three)
    adata = three_often.copy()
    adata.uns["scgpt"]["leakage"] = adata.uns["scgpt"]["leakage"].head(0)
    with pytest.raises(ValueError, match="no leakage gap of test cells; it is measured with group_key="):
        pl.leakage_gap(adata)
    with pytest.raises(ValueError, match="split must be 'val' or 'test', found None"):
        pl.leakage_gap(adata, split=None)
