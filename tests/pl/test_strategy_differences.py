from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection

from scdlkit import get, pl


@pytest.mark.parametrize("reference", ["baseline", "best"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_points_bars_and_certainty(three_often, reference, split):
    ax = pl.strategy_differences(three_often, reference=reference, split=split, show=False)
    table = three_often.uns["scgpt"]["differences"]
    table = table[(table["reference_role"] == reference) & (table["split"] == split)].set_index("strategy")
    ranked = [name for name in get.strategy_table(three_often)["strategy"] if name in table.index]
    table = table.loc[ranked]
    labels = [tick.get_text().removesuffix(" (baseline)") for tick in ax.get_yticklabels()]
    assert labels == ranked
    (points,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    (bars,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    np.testing.assert_array_equal(np.asarray(points.get_offsets())[:, 0], table["difference"])
    np.testing.assert_array_equal([segment[:, 0] for segment in bars.get_segments()], table[["low", "high"]])
    filled = ~np.isclose(points.get_facecolors(), 1).all(1)
    np.testing.assert_array_equal(filled, table["excludes_zero"])
    low, high = ax.get_xlim()
    assert low < min(0, table["low"].min()) and high > max(0, table["high"].max())
    assert table["reference"].iloc[0] in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_results_without_differences(older, three_often):
    with pytest.raises(KeyError, match="no table 'differences'"):
        pl.strategy_differences(older)
    adata = three_often.copy()
    table = adata.uns["scgpt"]["differences"]
    adata.uns["scgpt"]["differences"] = table[table["reference_role"] == "best"]
    with pytest.raises(ValueError, match="no differences to the baseline on test cells: no baseline finished"):
        pl.strategy_differences(adata)


def test_wrong_arguments(three_often):
    with pytest.raises(ValueError, match="reference must be 'baseline' or 'best', found 'lora'"):
        pl.strategy_differences(three_often, reference="lora")
    with pytest.raises(ValueError, match="split must be 'val' or 'test', found 'train'"):
        pl.strategy_differences(three_often, split="train")
