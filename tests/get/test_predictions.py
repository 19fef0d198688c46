from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scdlkit import get


@pytest.mark.parametrize("split", ["test", "val", "train", ["val", "test"], None])
def test_cells_and_labels_of_a_split(make_annotated, split):
    adata = make_annotated(3)
    frame = get.predictions(adata, split=split)
    wanted = ["train", "val", "test", "unlabelled"] if split is None else [split] if isinstance(split, str) else split
    keep = adata.obs["scgpt_split"].isin(wanted) & adata.obs["cell_type"].notna()
    obs = adata.obs[keep]
    assert list(frame.index) == list(obs.index)
    assert list(frame["true"]) == list(obs["cell_type"])
    assert list(frame["predicted"]) == list(obs["scgpt_label"])
    np.testing.assert_array_equal(frame["confidence"], obs["scgpt_label_confidence"])
    assert list(frame["split"]) == list(obs["scgpt_split"])


def test_unassigned_cells_have_no_confidence(make_annotated):
    frame = get.predictions(make_annotated(3))
    assert list(frame["predicted"].iloc[-4:]) == ["unassigned"] * 4
    assert frame["confidence"].iloc[-4:].isna().all()


def test_numeric_labels_become_text(make_annotated):
    adata = make_annotated(3)
    adata.obs["leiden"] = np.arange(adata.n_obs) % 3
    assert set(get.predictions(adata, label_key="leiden")["true"]) == {"0", "1", "2"}


def test_columns_of_another_name(make_annotated):
    adata = make_annotated(3)
    expected = get.predictions(adata)
    adata.obs.columns = [name.replace("scgpt_label", "celltype") for name in adata.obs.columns]
    adata.uns["scgpt"]["params"]["obs_key"] = "celltype"
    pd.testing.assert_frame_equal(get.predictions(adata), expected)


def test_duplicate_cell_names(make_annotated):
    adata = make_annotated(3)
    expected = list(get.predictions(adata)["true"])
    adata.obs.index = ["same"] * adata.n_obs
    assert list(get.predictions(adata)["true"]) == expected


def test_query_without_a_record_of_the_fit(make_annotated):
    adata = make_annotated(3)
    query = ad.AnnData(adata.X, obs=adata.obs.drop(columns="scgpt_split"))
    frame = get.predictions(query, split=None, label_key="cell_type")
    assert len(frame) == 1480
    assert set(frame["split"]) == {""}
    with pytest.raises(KeyError, match=r"scgpt_split.*pass split=None"):
        get.predictions(query, label_key="cell_type")
    with pytest.raises(KeyError, match=r"adata.uns\['scgpt'\]"):
        get.predictions(query, split=None)


def test_errors_name_what_is_missing(make_annotated):
    adata = make_annotated(3)
    with pytest.raises(ValueError, match="split must be None or of 'train', 'val', 'test', 'unlabelled', found 'tset'"):
        get.predictions(adata, split="tset")
    with pytest.raises(ValueError, match="no labelled cell with split='unlabelled'.*unlabelled 20"):
        get.predictions(adata, split="unlabelled")
    with pytest.raises(KeyError, match=r"adata.obs\['other'\] not found.*label_key="):
        get.predictions(adata, label_key="other")
    del adata.obs["scgpt_label"]
    with pytest.raises(KeyError, match=r"scgpt_label.*sk\.tl\.adapt_annotation.*sk\.tl\.predict"):
        get.predictions(adata)


def test_adata_is_not_changed(make_annotated):
    adata = make_annotated(3)
    before = adata.obs.copy()
    get.predictions(adata, split=None)
    pd.testing.assert_frame_equal(adata.obs, before)
