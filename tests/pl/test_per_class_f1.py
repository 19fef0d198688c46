from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scdlkit import get, pl


def _drawn(ax):
    return np.asarray(ax.images[0].get_array().filled(np.nan))


def _expected(adata, split, metric="f1"):
    scores = get.per_class_metrics(adata, split=split)
    names = [name for name in get.strategy_table(adata)["strategy"] if name in set(scores["strategy"])]
    return scores.pivot(index="class", columns="strategy", values=metric)[names]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("metric", ["f1", "recall"])
def test_values_in_the_order_of_the_classes(three_often, split, metric):
    ax = pl.per_class_f1(three_often, split=split, metric=metric, order="classes", show=False)
    table = _expected(three_often, split, metric)
    classes = list(three_often.uns["scgpt"]["classes"])
    np.testing.assert_array_equal(_drawn(ax), table.loc[classes])
    assert [tick.get_text().rpartition("  (")[0] for tick in ax.get_yticklabels()] == classes
    columns = [tick.get_text().removesuffix(" (baseline)") for tick in ax.get_xticklabels()]
    assert columns == list(table.columns) and "ia3" not in columns
    written = sorted(float(text.get_text()) for text in ax.texts)
    np.testing.assert_allclose(written, np.sort(table.to_numpy().ravel()), atol=0.005)
    plt.close(ax.figure)


def test_forty_classes_by_difficulty(forty_often, tmp_path):
    ax = pl.per_class_f1(forty_often, save=tmp_path / "a.png", show=False)
    drawn = _drawn(ax)
    assert drawn.shape == (40, 11)
    assert (np.diff(drawn.mean(1)) <= 1e-12).all()
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(_expected(forty_often, "test"), axis=0))
    assert not ax.texts
    plt.close(ax.figure)
    ax = pl.per_class_f1(forty_often, annotate=True, show=False)
    assert len(ax.texts) == 440
    plt.close(ax.figure)


def test_difference_to_a_strategy(three_often):
    ax = pl.per_class_f1(three_often, relative_to="pca_logreg", order="classes", show=False)
    table = _expected(three_often, "test").loc[list(three_often.uns["scgpt"]["classes"])]
    np.testing.assert_allclose(_drawn(ax), table.sub(table["pca_logreg"], axis=0))
    low, high = ax.images[0].get_clim()
    assert low == -high and high == pytest.approx(np.abs(_drawn(ax)).max())
    plt.close(ax.figure)
    with pytest.raises(ValueError, match="relative_to='ia3' has no score here; with scores: lora"):
        pl.per_class_f1(three_often, relative_to="ia3")


def test_classes_without_cells_are_hatched(three_often):
    adata = three_often.copy()
    table = adata.uns["scgpt"]["per_class"]
    table.loc[(table["class"] == "B") & (table["split"] == "test"), ["support", "f1"]] = 0.0
    table.loc[(table["class"] == "CD4 T") & (table["strategy"] == "lora"), "f1"] = np.nan
    ax = pl.per_class_f1(adata, show=False)
    drawn = _drawn(ax)
    assert np.isnan(drawn[-1]).all() and np.isnan(drawn).sum() == 12
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == 12
    assert ax.get_yticklabels()[-1].get_text() == "B  (0)"
    plt.close(ax.figure)


def test_order_of_the_user_and_errors(three_often, make_annotated):
    ax = pl.per_class_f1(three_often, order=["γδ T", "B", "CD4 T"], show=False)
    assert [tick.get_text().rpartition("  (")[0] for tick in ax.get_yticklabels()] == ["γδ T", "B", "CD4 T"]
    plt.close(ax.figure)
    for options, message in (
        ({"order": "size"}, "order must be 'difficulty', 'classes' or a list of all classes, found 'size'"),
        ({"order": ["B"]}, "each of the 3 classes once; check: CD4 T, γδ T"),
        ({"order": ["B", "B", "CD4 T", "γδ T"]}, "some class twice"),
        ({"metric": "mcc"}, "metric must be 'f1', 'precision' or 'recall', found 'mcc'"),
        ({"split": "train"}, "split must be 'val' or 'test', found 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            pl.per_class_f1(three_often, **options)
    adata = make_annotated(3)
    table = adata.uns["scgpt"]["per_class"]
    adata.uns["scgpt"]["per_class"] = table[table["split"] == "val"]
    with pytest.raises(ValueError, match="no per-class scores of the test cells"):
        pl.per_class_f1(adata)


def test_results_of_one_fit(three, forty, tmp_path):
    pl.per_class_f1(three, save=tmp_path / "a.png")
    pl.per_class_f1(forty, save=tmp_path / "b.png")
