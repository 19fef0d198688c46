from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import accuracy_score, f1_score

import scdlkit as sk
from scdlkit.foundation import HeadConfig, TrainingConfig
from scdlkit.foundation.bundle import read_bundle, write_bundle


def fit(adata, checkpoint, **options):
    runner = sk.AnnotationRunner(checkpoint=checkpoint, **{"strategies": ("frozen_probe",), "baselines": (), **options})
    runner.fit_compare(adata)
    return runner


@pytest.fixture(scope="module")
def fitted(_blood, checkpoint):
    """All strategies and the baseline, on cells of which every tenth has no label; and those cells."""
    adata = _blood.copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(adata.n_obs) % 10 != 0)
    runner = sk.AnnotationRunner(checkpoint=checkpoint, device="cpu", progress=False)
    runner.fit_compare(adata)
    return runner, adata


def test_table_holds_every_strategy_and_the_baseline(fitted):
    runner, _ = fitted
    assert set(runner.results_["strategy"]) == {"frozen_probe", "head", "pca_logreg"}
    assert runner.results_["rank"].tolist() == [1, 2, 3]
    assert runner.results_.set_index("strategy").loc["pca_logreg", "role"] == "baseline"
    strategies = runner.results_[runner.results_["role"] == "strategy"]
    assert runner.best_strategy_ == strategies.iloc[0]["strategy"]
    assert "pca_logreg" in runner.recommendation_
    seconds = runner.results_.set_index("strategy")["embed_seconds"]
    assert seconds["pca_logreg"] == 0 < seconds["head"] == seconds["frozen_probe"]
    assert runner.report_.n_labelled == 216 and runner.report_.feasible


def test_reported_test_metrics_are_those_of_the_annotation(fitted):
    """Independent truth: scikit-learn on the written labels of the written test cells."""
    runner, adata = fitted
    for name in ("frozen_probe", "head", "pca_logreg"):
        target = adata.copy()
        runner.annotate_adata(target, strategy=name)
        test = (target.obs["scgpt_split"] == "test").to_numpy()
        true, predicted = target.obs.loc[test, "cell_type"].astype(str), target.obs.loc[test, "scgpt_label"].astype(str)
        row = runner.results_.set_index("strategy").loc[name]
        assert row["test_accuracy"] == pytest.approx(accuracy_score(true, predicted))
        assert row["test_macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))


def test_splits_are_written_for_the_cells_of_the_fit(fitted):
    runner, adata = fitted
    target = adata.copy()
    runner.annotate_adata(target)
    split = target.obs["scgpt_split"]
    assert split.cat.categories.tolist() == ["train", "val", "test", "unlabelled"]
    assert ((split == "unlabelled") == target.obs["cell_type"].isna()).all()
    assert split.value_counts()["test"] == pytest.approx(0.15 * 216, abs=4)
    assert target.obs["scgpt_label"].notna().all()  # cells without a label are annotated


def test_prediction(fitted):
    runner, adata = fitted
    before = adata.copy()
    out = runner.predict(adata)
    assert set(out) == {"label_codes", "labels", "probabilities", "latent"}
    n = adata.n_obs
    assert out["probabilities"].shape == (n, 4) and out["latent"].shape == (n, 32)
    np.testing.assert_allclose(out["probabilities"].sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out["latent"], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(runner.classes_[out["label_codes"]], out["labels"])
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert not adata.obsm and not adata.uns and (adata.X != before.X).nnz == 0


def test_latent_is_the_zero_shot_embedding(fitted, checkpoint):
    runner, adata = fitted
    target = adata.copy()
    sk.tl.embed(target, checkpoint=checkpoint, random_state=42)
    np.testing.assert_allclose(runner.predict(adata)["latent"], target.obsm["X_scgpt"], atol=1e-5)


def test_cell_order_changes_nothing(blood, checkpoint):
    order = np.random.default_rng(0).permutation(blood.n_obs)
    options = {"strategies": ("frozen_probe", "head"), "baselines": ("pca_logreg",)}
    first, second = fit(blood, checkpoint, **options), fit(blood[order].copy(), checkpoint, **options)
    metrics = [c for c in first.results_ if c.startswith(("val_", "test_"))]
    pd.testing.assert_frame_equal(
        first.results_.set_index("strategy")[metrics].sort_index(),
        second.results_.set_index("strategy")[metrics].sort_index(),
        rtol=1e-6,
    )
    for name in ("frozen_probe", "head", "pca_logreg"):
        np.testing.assert_allclose(
            first.predict(blood, strategy=name)["probabilities"][order],
            second.predict(blood[order].copy(), strategy=name)["probabilities"],
            atol=1e-4,
        )


def test_query_with_other_genes_in_other_order(fitted):
    runner, adata = fitted
    rng = np.random.default_rng(1)
    extra = sp.csr_matrix(rng.poisson(1, (adata.n_obs, 30)).astype(np.float32))
    import anndata as ad

    genes = rng.permutation(adata.n_vars + 30)
    names = np.append(adata.var_names, [f"made-up-{i}" for i in range(30)])[genes]
    query = ad.AnnData(
        sp.hstack([adata.X, extra]).tocsr()[:, genes], obs=adata.obs[[]].copy(), var=pd.DataFrame(index=names)
    )
    same = runner.predict(query)
    np.testing.assert_allclose(same["probabilities"], runner.predict(adata)["probabilities"], atol=1e-5)
    half = query[:, :500].copy()
    for name in ("frozen_probe", "head", "pca_logreg"):
        assert runner.predict(half, strategy=name)["probabilities"].shape == (adata.n_obs, 4)


def test_cells_without_known_genes(blood, checkpoint, caplog):
    keep = np.ones(blood.n_obs)
    keep[[3, 77]] = 0
    blood.X = sp.csr_matrix(sp.diags(keep) @ blood.X, dtype=np.float32)
    runner = fit(blood, checkpoint)
    runner.annotate_adata(blood)
    empty = blood.obs_names[[3, 77]]
    assert (blood.obs.loc[empty, "scgpt_label"] == "unassigned").all()
    assert blood.obs.loc[empty, "scgpt_label_confidence"].isna().all()
    assert (blood.obs.loc[empty, "scgpt_label_code"] == -1).all()
    assert (blood.obs.loc[empty, "scgpt_split"] == "unlabelled").all()
    assert (blood.obsm["X_scgpt_best"][[3, 77]] == 0).all() and np.isnan(blood.obsm["scgpt_proba"][[3, 77]]).all()
    assert blood.obs["scgpt_label"].drop(empty).isin(runner.classes_).all()
    assert "2 cells have no gene that the checkpoint knows" in caplog.text


def test_no_cell_has_a_known_gene(blood, fitted, checkpoint):
    blood.X = sp.csr_matrix(blood.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="None of the 240 cells has a value of a gene that the checkpoint knows"):
        fit(blood, checkpoint)
    out = fitted[0].predict(blood)
    assert set(out["labels"]) == {"unassigned"} and np.isnan(out["probabilities"]).all() and not out["latent"].any()


def test_cells_that_are_in_the_data_twice_are_reported(blood, checkpoint, caplog):
    import anndata as ad

    twice = ad.concat([blood, blood], keys=["a", "b"], index_unique="-")
    fit(twice, checkpoint)
    assert "validation or test cells have the same genes in the same order of values" in caplog.text
    caplog.clear()
    fit(blood, checkpoint)
    assert "same order of values" not in caplog.text


def test_a_failed_fit_leaves_no_half_of_an_earlier_one(blood, checkpoint):
    runner = fit(blood, checkpoint)
    blood.obs["cell_type"] = blood.obs["cell_type"].cat.add_categories("loner")
    blood.obs.iloc[0, 0] = "loner"
    with pytest.raises(ValueError, match="loner"):
        runner.fit_compare(blood)
    with pytest.raises(RuntimeError, match="call fit_compare first"):
        runner.annotate_adata(blood)


def test_a_probe_does_not_read_the_matrix_of_the_cells_it_annotates(blood, checkpoint, monkeypatch):
    from scdlkit.foundation.expression import Expression

    runner = fit(blood, checkpoint)
    monkeypatch.setattr(Expression, "rows", lambda self, index: pytest.fail("the matrix was read at once"))
    assert len(runner.predict(blood)["labels"]) == 240


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(lambda codes: codes, id="integers"),
        pytest.param(lambda codes: codes % 2 == 0, id="booleans"),
        pytest.param(lambda codes: np.array(["NK/T", "", "γδ T", "a" * 300])[codes], id="odd names"),
        pytest.param(lambda codes: codes.astype(np.float32) / 2, id="floats"),
    ],
)
def test_labels_are_data(blood, checkpoint, tmp_path, labels):
    blood.obs["cell_type"] = labels(blood.obs["cell_type"].cat.codes.to_numpy())
    expected = {str(value) for value in blood.obs["cell_type"].unique()}
    runner = fit(blood, checkpoint)
    assert set(runner.classes_) == expected
    runner.annotate_adata(blood)
    loaded = sk.AnnotationRunner.load(runner.save(tmp_path / "m"))
    np.testing.assert_array_equal(loaded.predict(blood)["labels"], runner.predict(blood)["labels"])
    assert set(blood.obs["scgpt_label"].cat.categories) == expected


def test_unused_categories_and_small_classes(blood, checkpoint, caplog):
    blood.obs["cell_type"] = blood.obs["cell_type"].cat.add_categories(["never seen", "rare", "Rare 2"])
    blood.obs.iloc[:2, 0] = "rare"
    blood.obs.iloc[2, 0] = "Rare 2"
    with pytest.raises(ValueError, match="(?s)'?Rare 2.*|rare.*3"):
        fit(blood, checkpoint)
    runner = fit(blood, checkpoint, small_classes="drop")
    assert set(runner.classes_) == {"Dendritic", "CD14+ Monocyte", "CD19+ B", "CD56+ NK"}
    assert "Dropped 2 classes too small to split: rare (2), Rare 2 (1)" in caplog.text
    runner.annotate_adata(blood)
    assert (blood.obs["scgpt_split"].iloc[:3] == "unlabelled").all()


def test_groups_stay_together(blood, checkpoint):
    runner = fit(blood, checkpoint, group_key="donor")
    runner.annotate_adata(blood)
    assert blood.obs.groupby("donor", observed=True)["scgpt_split"].nunique().max() == 1
    assert set(blood.obs["scgpt_split"]) == {"train", "val", "test"}
    with pytest.raises(ValueError, match="group_key='nobody' is not a column.*'donor'"):
        fit(blood, checkpoint, group_key="nobody")
    blood.obs.loc[blood.obs_names[:3], "donor"] = None
    with pytest.raises(ValueError, match="missing for 3 cells"):
        fit(blood, checkpoint, group_key="donor")


@pytest.fixture(scope="module")
def repeated(_blood, checkpoint):
    """Two repeats of three folds by donor, with the leakage; and how many cells were embedded."""
    from scdlkit import _reader

    adata, embedded = _blood.copy(), []
    embed = _reader.embed_tokens

    def count(encoder, tokens, **options):
        embedded.append(tokens.n_cells)
        return embed(encoder, tokens, **options)

    runner = sk.AnnotationRunner(
        checkpoint=checkpoint, device="cpu", progress=False, group_key="donor", n_repeats=2, cv=3,
        strategies=("frozen_probe",),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_reader, "embed_tokens", count)
        runner.fit_compare(adata)
    return runner, adata, embedded


def test_repeated_folds_by_group(repeated):
    runner, adata, embedded = repeated
    assert embedded == [240]  # once for all fits
    folds = runner.folds_
    assert folds.groupby(["strategy", "split_by"]).size().to_dict() == {
        (name, by): 6 for name in ("frozen_probe", "pca_logreg") for by in ("cell", "group")
    }
    assert (runner.results_["n_fits"] == 6).all()
    by_group = folds[folds["split_by"] == "group"].groupby("strategy")["test_macro_f1"]
    table = runner.results_.set_index("strategy")
    np.testing.assert_allclose(table["test_macro_f1"], by_group.mean().reindex(table.index))
    np.testing.assert_allclose(table["test_macro_f1_sd"], by_group.std().reindex(table.index))
    assert (table["test_macro_f1_low"] < table["test_macro_f1"]).all()
    assert (table["test_macro_f1_high"] > table["test_macro_f1"]).all()
    assert set(runner.leakage_["strategy"]) == {"frozen_probe", "pca_logreg"}
    assert len(runner.history_) == 12 and set(runner.history_["fold"]) == {0, 1, 2}


def test_the_model_of_the_first_fit_is_kept(repeated):
    runner, adata, _ = repeated
    target = adata.copy()
    runner.annotate_adata(target)
    assert target.obs.groupby("donor", observed=True)["scgpt_split"].nunique().max() == 1
    test = (target.obs["scgpt_split"] == "test").to_numpy()
    true, predicted = (target.obs.loc[test, name].astype(str) for name in ("cell_type", "scgpt_label"))
    first = runner.folds_.query("strategy == 'frozen_probe' and split_by == 'group' and repeat == 0 and fold == 0")
    assert first["test_macro_f1"].item() == pytest.approx(f1_score(true, predicted, average="macro"))


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_tables_of_a_comparison_survive_files(repeated, through_disk, tmp_path, kind):
    runner, adata, _ = repeated
    target = adata.copy()
    runner.annotate_adata(target)
    back = through_disk(target, tmp_path, kind)
    for get, table in (
        (sk.get.strategy_table, "results_"),
        (sk.get.fold_metrics, "folds_"),
        (sk.get.differences, "differences_"),
        (sk.get.leakage_gap, "leakage_"),
        (sk.get.history, "history_"),
        (sk.get.per_class_metrics, "per_class_"),
    ):
        pd.testing.assert_frame_equal(get(back), getattr(runner, table), check_column_type=False)
    loaded = sk.AnnotationRunner.load(runner.save(tmp_path / "model"))
    pd.testing.assert_frame_equal(loaded.leakage_, runner.leakage_)
    assert (loaded.config, loaded.config.n_repeats, loaded.config.cv) == (runner.config, 2, 3)


def test_one_fit_is_the_first_of_several(blood, checkpoint):
    one, several = fit(blood, checkpoint), fit(blood, checkpoint, n_repeats=3)
    scores = [name for name in one.folds_ if name.startswith(("val_", "test_"))]
    pd.testing.assert_frame_equal(one.folds_[scores], several.folds_[scores].iloc[:1])
    np.testing.assert_array_equal(one.results_[scores[0]], one.folds_[scores[0]])
    np.testing.assert_array_equal(one.predict(blood)["labels"], several.predict(blood)["labels"])
    assert several.folds_["test_macro_f1"].nunique() > 1


def test_no_leakage_gap_without_groups_or_when_it_is_switched_off(blood, checkpoint):
    for options in ({}, {"group_key": "donor", "leakage_gap": False}):
        runner = fit(blood, checkpoint, **options)
        runner.annotate_adata(blood)
        assert runner.leakage_.empty and len(runner.folds_) == 1 and "leakage" not in blood.uns["scgpt"]
        with pytest.raises(KeyError, match="measured with a group_key="):
            sk.get.leakage_gap(blood)


def test_folds_that_cannot_be_are_refused_before_the_embedding(blood, checkpoint, monkeypatch):
    monkeypatch.setattr("scdlkit._reader.embed_tokens", lambda *args, **options: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="8 folds by groups need at least 8 groups with labelled cells, found 5"):
        fit(blood, checkpoint, group_key="donor", cv=8)


def test_duplicate_names(blood, checkpoint):
    blood.obs_names = ["same"] * 5 + list(blood.obs_names[5:])
    names = list(blood.var_names)
    names[1] = names[0]
    blood.var_names = names
    runner = fit(blood, checkpoint)
    runner.annotate_adata(blood)
    assert runner.report_.n_duplicates == 1
    assert "1 genes share a token" in str(runner.report_) and "obs_names are not unique" in str(runner.report_)
    assert blood.obs["scgpt_label"].notna().all()


def test_batch_size_and_draws(blood, checkpoint):
    training = TrainingConfig(batch_size=1, max_epochs=2)
    one = fit(blood, checkpoint, strategies=("head",), strategy_configs={"head": HeadConfig(training=training)})
    assert one.results_["error"].tolist() == [""] and one._strategies[0].config.training.batch_size == 1
    assert sk.AnnotationRunner(checkpoint=checkpoint, batch_size=7)._strategies[1].config.training.batch_size == 7
    single, mean = fit(blood, checkpoint).predict(blood), fit(blood, checkpoint, n_draws=3).predict(blood)
    assert 0.5 < np.abs(single["latent"] * mean["latent"]).sum(axis=1).mean() <= 1.0001
    assert not np.allclose(single["latent"], mean["latent"])


def test_save_and_load(fitted, tmp_path):
    runner, adata = fitted
    folder = runner.save(tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model_state.pt"]
    loaded = sk.AnnotationRunner.load(folder)
    for name in ("frozen_probe", "head", "pca_logreg"):
        ours, theirs = runner.predict(adata, strategy=name), loaded.predict(adata, strategy=name)
        np.testing.assert_array_equal(ours["labels"], theirs["labels"])
        # a loaded runner embeds all cells anew, in batches of its own: rounding may differ, labels may not
        np.testing.assert_allclose(ours["probabilities"], theirs["probabilities"], atol=1e-5)
    for table in ("results_", "folds_", "differences_", "leakage_", "history_", "per_class_"):
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(runner, table))
    assert str(loaded.report_) == str(runner.report_)
    assert (loaded.best_strategy_, loaded.recommendation_) == (runner.best_strategy_, runner.recommendation_)
    first, second = adata.copy(), adata.copy()
    runner.annotate_adata(first)
    loaded.annotate_adata(second)
    pd.testing.assert_series_equal(first.obs["scgpt_split"], second.obs["scgpt_split"])
    assert loaded.save(tmp_path / "again").is_dir()


def test_load_refuses_what_does_not_fit(fitted, tmp_path, checkpoint):
    runner, _ = fitted
    folder = runner.save(tmp_path / "model")
    other = checkpoint.parent / "torch_keys"
    with pytest.raises(ValueError, match="was fitted on checkpoint 'flash_keys' with sha256"):
        sk.AnnotationRunner.load(folder, checkpoint=other)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert sk.AnnotationRunner.load(folder, checkpoint=moved).best_strategy_ == runner.best_strategy_

    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("CD19+ B", "CD19+ T"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        sk.AnnotationRunner.load(folder)
    (folder / "manifest.json").write_text(text)

    manifest, tensors = read_bundle(folder)
    for change, message in [
        ({"classes": manifest["classes"][:-1]}, "knows 4 classes, the manifest names 3"),
        ({"best_strategy": "lora"}, "the best strategy 'lora' is not among the saved ones"),
        ({"classes": None}, "incomplete, it lacks classes"),
    ]:
        content = {k: v for k, v in {**manifest, **change}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            sk.AnnotationRunner.load(write_bundle(tmp_path / "edited", content, tensors))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head/")}
    with pytest.raises(ValueError, match="(?i)head.*(lack|miss)"):
        sk.AnnotationRunner.load(write_bundle(tmp_path / "lacking", manifest, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: t.pop("cells/keys"), "it lacks tensor cells/keys"),
        (lambda m, t: m["checkpoint"].pop("sha256"), "it lacks checkpoint sha256"),
        (lambda m, t: m["config"].update(new=1), "written by another version of scdlkit .*unexpected keyword"),
        (lambda m, t: m["config"].pop("ties"), "written by another version of scdlkit .*'ties'"),
        (lambda m, t: m["strategies"]["head"].pop("type"), "written by another version of scdlkit .*KeyError: 'type'"),
        (lambda m, t: m.update(strategies=[]), "written by another version of scdlkit"),
        (lambda m, t: m["tables"].clear(), "written by another version of scdlkit .*'strategies'"),
        (lambda m, t: m["checkpoint"].update(path="/nowhere/at/all"), "in /nowhere/at/all, which is not there; pass"),
    ],
)
def test_manifests_of_another_making(fitted, tmp_path, change, message):
    manifest, tensors = read_bundle(fitted[0].save(tmp_path / "model"))
    change(manifest, tensors)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        sk.AnnotationRunner.load(write_bundle(tmp_path / "edited", manifest, tensors))


def test_a_folder_called_like_a_registered_checkpoint_is_found_again(blood, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "heart")
    saved = fit(blood, folder, random_state=np.int64(7)).save(tmp_path / "model")
    loaded = sk.AnnotationRunner.load(saved)  # and not from the network
    assert loaded.checkpoint == str(folder) and loaded.config.random_state == 7


def test_nothing_executable_is_saved(fitted, tmp_path):
    folder = fitted[0].save(tmp_path / "model")
    assert torch.load(folder / "model_state.pt", weights_only=True)
    assert json.loads((folder / "manifest.json").read_text())["checkpoint"]["sha256"]


def test_before_fit(blood, checkpoint):
    runner = sk.AnnotationRunner(checkpoint=checkpoint)
    for action in (lambda: runner.predict(blood), lambda: runner.annotate_adata(blood), lambda: runner.save("x")):
        with pytest.raises(RuntimeError, match="call fit_compare first, or AnnotationRunner.load"):
            action()
    assert "not fitted" in repr(runner)
    assert runner.inspect(blood).n_cells == 240


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategies": ("magic",)}, ValueError, "Unknown strategy 'magic'; known are .*frozen_probe"),
        ({"strategies": "head"}, TypeError, "must be a sequence of names"),
        ({"strategies": ("head", "head")}, ValueError, "each strategy once"),
        ({"strategies": ()}, ValueError, "at least one strategy that is no baseline"),
        ({"strategy_configs": {"lora": {}}}, ValueError, "strategy_configs has lora, not among the strategies"),
        ({"strategy_configs": {"head": {"depth": 3}}}, ValueError, "HeadConfig has no setting depth"),
        ({"val_size": 0.0}, ValueError, "val_size must be between 0 and 1"),
        ({"random_state": None}, ValueError, "random_state must be an integer, found None"),
        ({"val_size": 0.5, "test_size": 0.5}, ValueError, "must leave cells to train on"),
        ({"n_repeats": 0}, ValueError, "n_repeats must be an integer of at least 1, found 0"),
        ({"cv": 1}, ValueError, "cv must be an integer of at least 2, found 1"),
        ({"leakage_gap": "yes"}, ValueError, "leakage_gap must be True or False, found 'yes'"),
        ({"small_classes": "ignore"}, ValueError, "small_classes must be 'error' or 'drop'"),
    ],
)
def test_bad_settings(options, error, message, checkpoint):
    with pytest.raises(error, match=message):
        sk.AnnotationRunner(checkpoint=checkpoint, **options)


def test_wrong_config_and_unfitted_strategy(fitted, checkpoint):
    with pytest.raises(ValueError, match="'frozen_probe' takes a FrozenProbeConfig, found .*HeadConfig"):
        sk.AnnotationRunner(checkpoint=checkpoint, strategy_configs={"frozen_probe": HeadConfig()})
    runner, adata = fitted
    with pytest.raises(ValueError, match="strategy='lora' is not fitted; fitted are"):
        runner.predict(adata, strategy="lora")
