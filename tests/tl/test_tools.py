from __future__ import annotations

import json
import warnings

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

import scdlkit as sk

FAST = {"strategies": ("frozen_probe",), "baselines": ()}


def test_embed(blood, checkpoint, tmp_path):
    before = blood.copy()
    assert sk.tl.embed(blood, checkpoint=checkpoint) is None
    latent = blood.obsm["X_scgpt"]
    assert latent.shape == (240, 32) and latent.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(latent, axis=1), 1, rtol=1e-5)
    assert (blood.X != before.X).nnz == 0 and blood.obs.equals(before.obs)

    order = np.random.default_rng(0).permutation(240)[:100]
    part = sk.tl.embed(before[order], checkpoint=checkpoint, batch_size=7, key_added="other", copy=True)
    np.testing.assert_allclose(part.obsm["other"], latent[order], atol=1e-5)
    for dtype in (np.float64,):
        same = ad.AnnData(before.X.astype(dtype).toarray(), obs=before.obs, var=before.var)
        sk.tl.embed(same, checkpoint=checkpoint)
        np.testing.assert_allclose(same.obsm["X_scgpt"], latent, atol=1e-5)
    blood.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").uns["X_scgpt"]["params"]["random_state"] == 42
    with pytest.raises(ValueError, match="n_draws must be at least 1, found 0"):
        sk.tl.embed(blood, checkpoint=checkpoint, n_draws=0)


def test_counts_and_log1p_embed_alike(checkpoint, blood):
    counts = blood.copy()
    counts.X = sp.csr_matrix(np.rint(np.expm1(blood.X.toarray()) * 2).astype(np.int64))
    logged = counts.copy()
    logged.X = sp.csr_matrix(np.log1p(counts.X.toarray() / 3.0))
    for adata in (counts, logged):
        sk.tl.embed(adata, checkpoint=checkpoint)
    np.testing.assert_allclose(counts.obsm["X_scgpt"], logged.obsm["X_scgpt"], atol=1e-5)


@pytest.fixture(scope="module")
def adapted(_blood, checkpoint, tmp_path_factory):
    adata, folder = _blood.copy(), tmp_path_factory.mktemp("out")
    with mpl.rc_context({"backend": "Agg"}):
        runner = sk.tl.adapt_annotation(
            adata, checkpoint=checkpoint, output_dir=folder, device="cpu", progress=False, random_state=1
        )
    return adata, runner, folder


def test_adapt_writes_all_fields(adapted):
    adata, runner, _ = adapted
    assert isinstance(runner, sk.AnnotationRunner)
    assert isinstance(adata.obs["scgpt_label"].dtype, pd.CategoricalDtype)
    assert {"scgpt_label_code", "scgpt_label_confidence", "scgpt_split"} <= set(adata.obs)
    assert adata.obsm["X_scgpt_best"].shape == (240, 32) and adata.obsm["scgpt_proba"].shape == (240, 4)
    confidence = adata.obsm["scgpt_proba"].max(axis=1)
    np.testing.assert_allclose(adata.obs["scgpt_label_confidence"], confidence)
    result = adata.uns["scgpt"]
    assert set(result) == {"params", "classes", "strategies", "folds", "differences", "history", "per_class"}
    assert result["classes"].tolist() == adata.obs["cell_type"].cat.categories.tolist()
    assert result["params"]["best_strategy"] == runner.best_strategy_
    assert result["params"]["checkpoint_sha256"] and result["params"]["label_key"] == "cell_type"


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_results_survive_files_and_feed_get_and_pl(adapted, tmp_path, form):
    adata, runner, _ = adapted
    path = tmp_path / f"a.{form}"
    if form == "h5ad":
        adata.write_h5ad(path)
        back = ad.read_h5ad(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # anndata's, of the zarr format to come
            adata.write_zarr(path)
        back = ad.read_zarr(path)
    pd.testing.assert_frame_equal(back.obs, adata.obs)
    np.testing.assert_array_equal(back.obsm["scgpt_proba"], adata.obsm["scgpt_proba"])
    for source in (adata, back):
        tidy = sk.get.strategy_metrics(source)
        best = tidy.query("strategy == @runner.best_strategy_ and split == 'test' and metric == 'macro_f1'")
        expected = runner.results_.set_index("strategy").loc[runner.best_strategy_, "test_macro_f1"]
        assert best["value"].item() == pytest.approx(expected)
    sk.pl.strategy_comparison(back, show=False)
    sk.pl.confusion_matrix(back, show=False)
    plt.close("all")


def test_artefacts(adapted):
    adata, runner, folder = adapted
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "strategy_metrics.csv", "folds.csv", "differences.csv", "report.md", "confusion_matrix.png", "embedding_umap.png", "reliability.png",
        "strategy_comparison.png", "strategy_tradeoff.png", "model", "training",
    }  # fmt: skip
    table = pd.read_csv(folder / "strategy_metrics.csv")
    assert table["strategy"].tolist() == runner.results_["strategy"].tolist()
    report = (folder / "report.md").read_text()
    assert runner.recommendation_ in report and "| pca_logreg | baseline |" in report
    row = runner.results_.set_index("strategy").loc["head"]
    bounds = f"{row['test_macro_f1']:.3f} ({row['test_macro_f1_low']:.3f} to {row['test_macro_f1_high']:.3f})"
    assert f"{bounds} | 1 of 1 |" in report and "Split by cells, one split: 1 fit of each" in report
    assert "Leakage" not in report
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
        assert f"]({path.name})" in report


def test_artefacts_of_repeated_folds_by_group(blood, checkpoint, tmp_path):
    options = {"strategies": ("frozen_probe",), "group_key": "donor", "output_dir": tmp_path}
    with mpl.rc_context({"backend": "Agg"}):
        runner = sk.tl.adapt_annotation(blood, checkpoint=checkpoint, cv=3, n_repeats=2, **options)
        report = (tmp_path / "report.md").read_text()
        for name, table in (
            ("folds", runner.folds_),
            ("differences", runner.differences_),
            ("leakage", runner.leakage_),
        ):
            back = pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False, na_values=[""])
            back = back.fillna({"error": ""}) if name == "folds" else back
            pd.testing.assert_frame_equal(back, table, check_dtype=False)
        assert "Split by whole values of `donor`, 3 folds, 2 times: 6 fits of each strategy" in report
        gap = runner.leakage_.query("strategy == 'pca_logreg' and split == 'test'").iloc[0]
        assert f"| pca_logreg | {gap['by_cell']:.3f} | {gap['by_group']:.3f} | {gap['gap']:.3f} (" in report
        difference = runner.differences_.query("strategy == 'frozen_probe' and split == 'test'").iloc[0]
        assert f"| frozen_probe | pca_logreg (best baseline) | {difference['difference']:+.3f} (" in report
        sk.tl.adapt_annotation(blood, checkpoint=checkpoint, leakage_gap=False, **options)
    assert not (tmp_path / "leakage.csv").exists()
    plt.close("all")


def test_scanpy_works_right_after(adapted):
    adata = adapted[0].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap's, about threads
        sc.pp.neighbors(adata, use_rep="X_scgpt_best")
        sc.tl.umap(adata)
        axes = sc.pl.umap(adata, color="scgpt_label", show=False)
    assert axes.get_legend() is not None
    plt.close("all")


def test_predict_with_a_runner_and_with_a_path(adapted, blood):
    _, runner, folder = adapted
    query = blood[::2].copy()
    del query.obs["cell_type"]
    assert sk.tl.predict(query, runner) is None
    again = sk.tl.predict(blood[::2], folder / "model", key_added="mine", copy=True)
    assert query.obs["scgpt_label"].tolist() == again.obs["mine_label"].tolist()
    assert {"mine_label_confidence", "mine_split"} <= set(again.obs) and "X_mine_best" in again.obsm
    assert (query.obs["scgpt_split"] != "unlabelled").all()  # recognised as cells of the fit
    sk.tl.predict(query, str(folder / "model"), strategy="pca_logreg")
    assert query.uns["scgpt"]["params"]["strategy"] == "pca_logreg"
    with pytest.raises(TypeError, match="runner must be an AnnotationRunner or the path"):
        sk.tl.predict(query, 3)
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        sk.tl.predict(query, folder / "nowhere")


def test_a_view_is_written_as_its_own(adapted, blood):
    _, runner, _ = adapted
    view = blood[:20]
    sk.tl.predict(view, runner)
    assert "scgpt_label" in view.obs and "scgpt_label" not in blood.obs


def test_errors_leave_the_data_alone(blood, checkpoint):
    blood.X[3, blood.X[3].indices[0]] = np.nan
    keys = (set(blood.obs), set(blood.obsm), set(blood.uns), set(blood.var), set(blood.layers))
    for call in (
        lambda: sk.tl.adapt_annotation(blood, checkpoint=checkpoint, **FAST),
        lambda: sk.tl.embed(blood, checkpoint=checkpoint),
        lambda: sk.pp.tokenize(blood, checkpoint=checkpoint),
    ):
        with pytest.raises(ValueError, match="(?i)nan"):
            call()
    assert keys == (set(blood.obs), set(blood.obsm), set(blood.uns), set(blood.var), set(blood.layers))


def test_backed_input(blood, checkpoint, tmp_path):
    blood.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    runner = sk.tl.adapt_annotation(backed, checkpoint=checkpoint, **FAST)
    sk.tl.adapt_annotation(blood, checkpoint=checkpoint, **FAST)
    assert backed.obs["scgpt_label"].tolist() == blood.obs["scgpt_label"].tolist()
    assert runner.report_.n_cells == 240
    backed.file.close()


def test_a_backed_view_or_copy_is_refused_before_any_work(adapted, blood, checkpoint, tmp_path):
    blood.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    runner = adapted[1]
    for call in (
        lambda: sk.tl.adapt_annotation(backed[:100], checkpoint=checkpoint, **FAST),
        lambda: sk.tl.embed(backed[:100], checkpoint=checkpoint),
        lambda: sk.pp.tokenize(backed, checkpoint=checkpoint, copy=True),
        lambda: sk.tl.predict(backed, runner, copy=True),
        lambda: runner.annotate_adata(backed[:100]),
    ):
        with pytest.raises(ValueError, match=r"backed by a file: call adata.to_memory\(\) first"):
            call()
    assert runner.predict(backed[:100])["labels"].shape == (100,)  # reading is fine
    backed.file.close()


def test_no_anndata(blood, checkpoint):
    for call in (sk.tl.embed, sk.tl.adapt_annotation, sk.pp.tokenize):
        with pytest.raises(TypeError, match="adata must be an AnnData, found ndarray"):
            call(blood.X.toarray(), checkpoint=checkpoint)


def test_labels_are_never_overwritten(blood, checkpoint):
    blood.obs["scgpt_label"] = blood.obs["cell_type"]
    before = blood.obs.copy()
    with pytest.raises(ValueError, match=r"would overwrite adata.obs\['scgpt_label'\]"):
        sk.tl.adapt_annotation(blood, "scgpt_label", checkpoint=checkpoint, **FAST)
    runner = sk.tl.adapt_annotation(blood, "scgpt_label", checkpoint=checkpoint, key_added="again", **FAST)
    with pytest.raises(ValueError, match=r"would overwrite adata.obs\['scgpt_label'\]"):
        runner.annotate_adata(blood)
    pd.testing.assert_frame_equal(blood.obs[before.columns], before)


def test_output_dir_is_checked_before_training(blood, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "used" / "model").mkdir(parents=True)
    (tmp_path / "used" / "model" / "thesis.docx").write_text("years of work")
    for name, message in (("file", "is a file; give a folder"), ("used", "holds thesis.docx, not only a saved model")):
        with pytest.raises(ValueError, match=message):
            sk.tl.adapt_annotation(blood, checkpoint=checkpoint, output_dir=tmp_path / name, **FAST)
    assert "scgpt_label" not in blood.obs


def test_a_cell_with_20000_genes(checkpoint):
    vocabulary = list(json.loads((checkpoint / "vocab.json").read_text()))
    names = [name for name in vocabulary if not name.startswith("<")]
    names += [f"made-up-{i}" for i in range(20_000 - len(names))]
    cell = ad.AnnData(np.random.default_rng(0).poisson(3, (2, 20_000)) + 1, var=pd.DataFrame(index=names))
    sk.tl.embed(cell, checkpoint=checkpoint)
    assert np.isfinite(cell.obsm["X_scgpt"]).all()
    assert sk.inspect_annotation_data(cell, "", checkpoint=checkpoint).share_above_max_length == 1


def test_top_level_names_are_the_same_objects():
    assert sk.adapt_annotation is sk.tl.adapt_annotation
    assert sk.inspect_annotation_data is sk.pp.inspect_annotation_data
    from scdlkit.runner import AnnotationRunner

    assert sk.AnnotationRunner is AnnotationRunner
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sk.nothing  # noqa: B018
