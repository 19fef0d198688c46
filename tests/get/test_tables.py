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
    assert list(tidy.columns) == ["strategy", "role", "split", "metric", "value", "sd", "low", "high"]
    assert len(tidy) == len(table) * 12
    assert not tidy.duplicated(["strategy", "split", "metric"]).any()
    for row in tidy.itertuples():
        expected = table.loc[table["strategy"] == row.strategy, f"{row.split}_{row.metric}"].item()
        np.testing.assert_equal(row.value, expected)
        bounds = [
            table.loc[table["strategy"] == row.strategy, f"{row.split}_macro_f1_{b}"].item() for b in ("low", "high")
        ]
        np.testing.assert_equal([row.low, row.high], bounds if row.metric == "macro_f1" else [np.nan] * 2)
        assert np.isnan(row.sd)  # one fit
    assert list(tidy["strategy"].unique()) == list(table["strategy"])


def test_spread_over_the_fits(make_annotated):
    adata = make_annotated(3, n_repeats=4)
    tidy, folds = get.strategy_metrics(adata), get.fold_metrics(adata)
    assert len(folds) == 4 * 9
    for row in tidy.itertuples():
        values = folds.loc[folds["strategy"] == row.strategy, f"{row.split}_{row.metric}"]
        np.testing.assert_allclose([row.value, row.sd], [np.mean(values), np.std(values, ddof=1)])
    by_cell = folds.assign(split_by="group")
    adata.uns["scgpt"]["folds"] = pd.concat([by_cell, folds.assign(val_macro_f1=0.1)])
    pd.testing.assert_frame_equal(get.strategy_metrics(adata), tidy)  # fits by cell are for the leakage alone
    head = get.fold_metrics(adata, strategy="head")
    assert set(head["strategy"]) == {"head"} and head["split_by"].tolist() == ["group"] * 4 + ["cell"] * 4


def test_differences_select(adata):
    table = get.differences(adata)
    assert table["excludes_zero"].dtype == bool and set(table["reference"]) == {"pca_logreg", "lora"}
    test = get.differences(adata, split="test")
    pd.testing.assert_frame_equal(test, table[table["split"] == "test"].reset_index(drop=True))
    with pytest.raises(ValueError, match="split must be one of 'val', 'test' or None, found 'train'"):
        get.differences(adata, split="train")


@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr"])
def test_leakage_needs_groups(make_annotated, through_disk, tmp_path, kind):
    adata = make_annotated(3, group_key="donor")
    stored = adata.uns["scgpt"]["leakage"]
    back = adata if kind == "memory" else through_disk(adata, tmp_path, kind)
    pd.testing.assert_frame_equal(get.leakage_gap(back), stored, check_column_type=False)
    assert set(get.leakage_gap(back, split="val")["split"]) == {"val"}
    with pytest.raises(KeyError, match=r"has no 'leakage': it is measured with a group_key= and without leakage_gap"):
        get.leakage_gap(make_annotated(3))


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
