from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scdlkit import get


@pytest.fixture(params=["memory", "h5ad", "zarr"])
def adata(request, make_annotated, through_disk, tmp_path):
    made = make_annotated(3)
    return made if request.param == "memory" else through_disk(made, tmp_path, request.param)


def test_strategy_table_is_what_was_stored(adata, make_annotated):
    stored = make_annotated(3).uns["scgpt"]["strategies"]
    pd.testing.assert_frame_equal(get.strategy_table(adata), stored, check_column_type=False)


def test_strategy_table_sorts_by_rank_and_copies(make_annotated):
    adata = make_annotated(3)
    stored = adata.uns["scgpt"]["strategies"]
    adata.uns["scgpt"]["strategies"] = stored.iloc[::-1]
    table = get.strategy_table(adata)
    assert list(table["rank"]) == sorted(stored["rank"])
    table["strategy"] = "changed"
    assert "changed" not in set(adata.uns["scgpt"]["strategies"]["strategy"])


def test_strategy_metrics_hold_every_number_once(adata):
    table, tidy = get.strategy_table(adata), get.strategy_metrics(adata)
    assert list(tidy.columns) == ["strategy", "role", "split", "metric", "value"]
    assert len(tidy) == len(table) * 12
    assert not tidy.duplicated(["strategy", "split", "metric"]).any()
    for row in tidy.itertuples():
        expected = table.loc[table["strategy"] == row.strategy, f"{row.split}_{row.metric}"].item()
        np.testing.assert_equal(row.value, expected)
    assert list(tidy["strategy"].unique()) == list(table["strategy"])


def test_history_of_one_strategy(adata):
    assert len(get.history(adata)) == 113
    head = get.history(adata, strategy="head")
    assert list(head["epoch"]) == list(range(1, 25))
    assert get.history(adata, strategy="frozen_probe").empty


def test_per_class_metrics_select(adata):
    everything = get.per_class_metrics(adata)
    some = get.per_class_metrics(adata, strategy="lora", split="test")
    assert list(some["class"]) == ["B", "CD4 T", "γδ T"]
    expected = everything[(everything["strategy"] == "lora") & (everything["split"] == "test")]
    pd.testing.assert_frame_equal(some, expected.reset_index(drop=True))


def test_text_of_categorical_columns_and_missing_errors_is_plain(make_annotated):
    adata = make_annotated(3)
    table = adata.uns["scgpt"]["strategies"]
    table["strategy"] = table["strategy"].astype("category")
    table["error"] = table["error"].replace("", np.nan).astype(object)
    plain = get.strategy_table(adata)
    assert plain["strategy"].dtype == object
    assert plain["error"].iloc[0] == ""
    assert plain["error"].iloc[-1].startswith("ValueError")


def test_other_key(make_annotated):
    adata = make_annotated(3, key="fine")
    assert len(get.strategy_table(adata, key="fine")) == 9
    with pytest.raises(KeyError, match=r"adata.uns\['scgpt'\].*stored under: 'fine'.*adapt_annotation"):
        get.strategy_table(adata)


def test_nothing_there(make_annotated):
    adata = ad.AnnData(np.ones((3, 2)))
    with pytest.raises(KeyError, match=r"Run sk\.tl\.adapt_annotation\(adata, label_key=\.\.\.\) first"):
        get.strategy_metrics(adata)
    with pytest.raises(KeyError, match=r"key_added='mine'"):
        get.history(adata, key="mine")
    with pytest.raises(TypeError, match="adata must be an AnnData, found dict"):
        get.strategy_table({})
    adata.uns["scgpt"] = {"params": {}}
    with pytest.raises(KeyError, match=r"no table 'per_class' \(found: params\)"):
        get.per_class_metrics(adata)


def test_unknown_choices(make_annotated):
    adata = make_annotated(3)
    with pytest.raises(ValueError, match="'bogus' was not compared here; compared: lora, full_finetune"):
        get.history(adata, strategy="bogus")
    with pytest.raises(ValueError, match="split must be one of 'val', 'test' or None, found 'train'"):
        get.per_class_metrics(adata, split="train")
