from __future__ import annotations

import logging

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from scdlkit import pl


def _truth(adata, split, order, normalize="true"):
    """scikit-learn's matrix over classes and a last column of unassigned cells."""
    obs = adata.obs[adata.obs["cell_type"].notna()]
    if split is not None:
        obs = obs[obs["scgpt_split"] == split]
    labels = [*order, "unassigned"]
    true, predicted = obs["cell_type"].astype(str), obs["scgpt_label"].astype(str)
    return metrics.confusion_matrix(true, predicted, labels=labels, normalize=normalize)[:-1], obs


def _drawn(ax):
    return np.asarray(ax.images[0].get_array().filled(np.nan))


def _rows(ax):
    return [tick.get_text().rpartition("  (")[0] for tick in ax.get_yticklabels()]


@pytest.mark.parametrize("split", ["test", "val", "train", None])
def test_three_classes_against_sklearn(three, split):
    ax = pl.confusion_matrix(three, split=split, show=False)
    classes = list(three.uns["scgpt"]["classes"])
    truth, obs = _truth(three, split, classes)
    n_columns = 4 if (obs["scgpt_label"] == "unassigned").any() else 3
    np.testing.assert_allclose(_drawn(ax), truth[:, :n_columns])
    assert _rows(ax) == classes
    counts = [int(tick.get_text().rpartition("(")[2].rstrip(")")) for tick in ax.get_yticklabels()]
    assert counts == list(obs["cell_type"].value_counts(sort=False))
    assert f"{len(obs):,}" in ax.get_title(loc="left")
    plt.close(ax.figure)


@pytest.mark.parametrize("order", ["classes", "hierarchical", "given"])
def test_forty_classes_against_sklearn_in_any_order(forty, order):
    classes = list(forty.uns["scgpt"]["classes"])
    given = classes[::-1]
    ax = pl.confusion_matrix(forty, order=given if order == "given" else order, show=False)
    counts, obs = _truth(forty, "test", classes, normalize=None)
    drawn = _drawn(ax)
    assert drawn.shape == (40, 41)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    shown = [int(tick.get_text().rpartition("(")[2].rstrip(")").replace(",", "")) for tick in ax.get_yticklabels()]
    if order == "hierarchical":
        assert sorted(shown) == sorted(counts.sum(axis=1))
        # Kindred classes stand together: the mass beside the diagonal is more than in the order as learned.
        plain, _ = _truth(forty, "test", classes)

        def near(matrix):
            return np.trace(matrix, offset=1) + np.trace(matrix[:, :40], offset=-1)

        assert near(drawn[:, :40]) > 2 * near(plain[:, :40])
    else:
        truth, _ = _truth(forty, "test", given if order == "given" else classes)
        np.testing.assert_allclose(drawn, truth)
    # The diagonal is recall, class by class.
    position = {name: row for row, name in enumerate(_rows(ax))}
    assert drawn[position["NK/T"], position["NK/T"]] == pytest.approx(
        (obs.query("cell_type == 'NK/T'")["scgpt_label"] == "NK/T").mean()
    )
    plt.close(ax.figure)


def test_numbers_in_cells(three, forty):
    ax = pl.confusion_matrix(three, counts=True, show=False)
    truth, _ = _truth(three, "test", list(three.uns["scgpt"]["classes"]), normalize=None)
    written = {tuple(map(int, text.get_position()[::-1])): int(text.get_text()) for text in ax.texts}
    assert written == {place: n for place, n in np.ndenumerate(truth) if n}
    plt.close(ax.figure)
    for options, expected in [({}, 0), ({"annotate": True}, 1), ({"counts": True}, 1), ({"annotate": False}, 0)]:
        ax = pl.confusion_matrix(forty, **options, show=False)
        assert (len(ax.texts) > 0) == expected
        plt.close(ax.figure)
    ax = pl.confusion_matrix(three, annotate=False, show=False)
    assert not ax.texts
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("split", "warning"),
    [("test", ""), ("val", "used to choose"), ("train", "seen in training"), (None, "seen in training")],
)
def test_only_test_cells_pass_without_a_remark(three, split, warning):
    ax = pl.confusion_matrix(three, split=split, show=False)
    title = ax.get_title(loc="left")
    assert warning in title
    assert ("no measure" in title or "used to" in title) == bool(warning)
    plt.close(ax.figure)


def test_class_without_test_cells_is_masked_and_hatched(make_annotated):
    adata = make_annotated(3)
    adata.obs.loc[adata.obs["cell_type"] == "B", "scgpt_split"] = "train"
    ax = pl.confusion_matrix(adata, show=False)
    assert np.isnan(_drawn(ax)[0]).all()
    assert len(ax.patches) == 1
    assert ax.get_yticklabels()[0].get_text() == "B  (0)"
    plt.close(ax.figure)


def test_a_class_called_unassigned_is_not_the_missing_ones():
    obs = pd.DataFrame(
        {
            "cell_type": ["a", "a", "unassigned", "unassigned"],
            "scgpt_label": ["a", "unassigned", "unassigned", "unassigned"],
            "scgpt_label_confidence": [0.9, 0.8, 0.7, np.nan],
            "scgpt_split": "test",
        },
        index=list("1234"),
    )
    adata = ad.AnnData(np.ones((4, 1)), obs=obs)
    adata.uns["scgpt"] = {"params": {"label_key": "cell_type"}, "classes": np.array(["a", "unassigned"])}
    ax = pl.confusion_matrix(adata, show=False)
    np.testing.assert_allclose(_drawn(ax), [[0.5, 0.5, 0], [0, 0.5, 0.5]])
    plt.close(ax.figure)


def test_query_without_record(three):
    query = ad.AnnData(three.X, obs=three.obs.drop(columns="scgpt_split"))
    ax = pl.confusion_matrix(query, split=None, label_key="cell_type", show=False)
    truth, _ = _truth(three, None, ["B", "CD4 T", "γδ T"])
    np.testing.assert_allclose(_drawn(ax), truth)
    assert "1,480 labelled cells" in ax.get_title(loc="left")
    plt.close(ax.figure)


def test_labels_the_model_does_not_know_are_left_out_and_said(make_annotated, caplog):
    adata = make_annotated(3)
    adata.obs["other"] = adata.obs["cell_type"].astype(object).replace("B", "Plasma")
    with caplog.at_level(logging.INFO, logger="scdlkit"):
        ax = pl.confusion_matrix(adata, label_key="other", show=False)
    assert "Plasma" in caplog.text
    assert np.isnan(_drawn(ax)[0]).all()
    plt.close(ax.figure)
    adata.obs["other"] = "nothing known"
    with pytest.raises(ValueError, match="none of the true labels is a class of the model: nothing known"):
        pl.confusion_matrix(adata, label_key="other")


def test_two_classes_and_odd_names(tmp_path):
    names = ["", "$x_1$ “β” / a very long name of a cell type that nobody can read in full"]
    obs = pd.DataFrame(
        {
            "cell_type": names * 5,
            "scgpt_label": pd.Categorical(names * 5),
            "scgpt_label_confidence": 0.9,
            "scgpt_split": "test",
        },
        index=[str(i) for i in range(10)],
    )
    adata = ad.AnnData(np.ones((10, 1)), obs=obs)
    adata.uns["scgpt"] = {"params": {"label_key": "cell_type"}, "classes": np.array(names, dtype=object)}
    ax = pl.confusion_matrix(adata, order="hierarchical", save=tmp_path / "odd.png", show=False)
    np.testing.assert_array_equal(_drawn(ax), np.eye(2))
    assert _rows(ax)[0] == "(empty)" and "…" in _rows(ax)[1]
    plt.close(ax.figure)


def test_wrong_order(three):
    with pytest.raises(
        ValueError, match="order must be 'hierarchical', 'classes' or a list of all classes, found 'abc'"
    ):
        pl.confusion_matrix(three, order="abc")
    with pytest.raises(ValueError, match="each of the 3 classes once; check: CD4 T, γδ T"):
        pl.confusion_matrix(three, order=["B"])
    with pytest.raises(ValueError, match="some class twice"):
        pl.confusion_matrix(three, order=["B", "B", "CD4 T", "γδ T"])
