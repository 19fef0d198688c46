from __future__ import annotations

import json
import shutil
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdlkit as sk


def inspect(adata, checkpoint, **options):
    return sk.pp.inspect_annotation_data(adata, checkpoint=checkpoint, **options)


def test_report(blood, checkpoint):
    vocab = json.loads((checkpoint / "vocab.json").read_text())
    report = inspect(blood, checkpoint)
    known = np.array([name in vocab for name in blood.var_names])
    expressed = np.asarray((blood.X[:, known] != 0).sum(axis=1)).ravel()
    assert (report.checkpoint, report.label_key, report.n_cells, report.n_labelled) == (
        "flash_keys",
        "cell_type",
        240,
        240,
    )
    assert (report.n_genes, report.n_matched) == (765, known.sum()) and report.overlap == known.mean()
    assert sum(report.matched_how.values()) == known.sum()
    assert report.genes_per_cell["median"] == np.median(expressed)
    assert report.genes_per_cell["q75"] == np.percentile(expressed, 75)
    assert report.class_counts == blood.obs["cell_type"].value_counts().to_dict()
    assert report.smallest_class == blood.obs["cell_type"].value_counts().idxmin()
    assert (report.matrix, report.values, report.feasible) == ("X", "log1p", True)
    assert report.group_candidates == {"donor": 5}
    assert report.max_length == 1200 and report.share_above_max_length == 0
    assert inspect(blood, checkpoint, max_length=200).share_above_max_length == (expressed > 199).mean()


def test_report_forms(blood, checkpoint):
    blood.obs["cell_type"] = blood.obs["cell_type"].cat.rename_categories({"CD19+ B": "<b>B & co</b>"})
    report = inspect(blood, checkpoint)
    assert "765" in str(report) and "4 in 'cell_type'" in str(report) and "log1p" in str(report)
    page = report._repr_html_()
    assert page.startswith("<table>") and "<b>B" not in page
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_genes_alone(blood, checkpoint):
    del blood.obs["cell_type"]
    report = inspect(blood, checkpoint, label_key="")
    assert report.label_key == "" and report.class_counts == {} and report.n_matched == 705
    assert "classes" not in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.obs.__delitem__("cell_type"), "No label_key given and 'cell_type' is not a column.*'donor'"),
        (lambda a: a.obs.__setitem__("cell_type", np.nan), "at least 2 different labels, found none"),
        (lambda a: a.obs.__setitem__("cell_type", "B"), r"at least 2 different labels, found one \('B'\)"),
    ],
)
def test_unusable_labels(blood, checkpoint, change, message):
    change(blood)
    with pytest.raises(ValueError, match=message):
        inspect(blood, checkpoint)


def test_class_of_one_cell_is_reported_as_infeasible(blood, checkpoint):
    blood.obs["cell_type"] = blood.obs["cell_type"].astype(str)
    blood.obs.iloc[0, 0] = "loner"
    report = inspect(blood, checkpoint)
    assert report.smallest_class == "loner" and not report.feasible
    assert "loner" in "".join(report.split_problems)
    dropped = inspect(blood, checkpoint, small_classes="drop")
    assert dropped.feasible and "loner" not in dropped.class_counts
    assert "Dropped 1 classes too small to split: loner (1)" in str(dropped)


def test_values_of_different_type_with_one_text(blood, checkpoint):
    blood.obs["cell_type"] = pd.Series([1, "1"] * 120, index=blood.obs_names, dtype=object)
    with pytest.raises(ValueError, match="different values with the same text"):
        inspect(blood, checkpoint)


@pytest.mark.parametrize(("n_obs", "n_vars"), [(0, 765), (240, 0), (0, 0)])
def test_empty(blood, checkpoint, n_obs, n_vars):
    with pytest.raises(ValueError, match="(?i)no (cells|genes)|0 (cells|genes)"):
        inspect(blood[:n_obs, :n_vars].copy(), checkpoint, label_key="")


def test_empty_and_foreign_objects_are_named_as_such(blood, checkpoint):
    for empty in (ad.AnnData(), blood[:0].copy()):
        with pytest.raises(ValueError, match="adata has no cells"):
            inspect(empty, checkpoint)
    with pytest.raises(TypeError, match="adata must be an AnnData, found DataFrame"):
        inspect(blood.to_df(), checkpoint)


def test_no_gene_matches(blood, checkpoint):
    blood.var_names = [f"thing{i}" for i in range(blood.n_vars)]
    with pytest.raises(ValueError, match="0 matched of 765, 77 needed"):
        inspect(blood, checkpoint)


def test_mouse_genes_are_refused(blood, checkpoint):
    blood.var_names = [name.capitalize() for name in blood.var_names]
    with pytest.raises(ValueError, match="(?i)mouse"):
        inspect(blood, checkpoint)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_impossible_values_are_located(blood, checkpoint, value):
    blood.X[7, blood.X[7].indices[0]] = value
    gene = blood.var_names[blood.X[7].indices[0]]
    with pytest.raises(ValueError, match=f"(?s){blood.obs_names[7]}.*{gene}|{gene}.*{blood.obs_names[7]}"):
        inspect(blood, checkpoint)


def test_inputs_of_every_form_give_one_report(blood, checkpoint, tmp_path):
    expected = inspect(blood, checkpoint).to_dict()
    forms = {
        "csc": sp.csc_matrix(blood.X),
        "dense": blood.X.toarray(),
        "float64": blood.X.astype(np.float64),
        "csr_array": sp.csr_array(blood.X),
    }
    for name, matrix in forms.items():
        assert inspect(ad.AnnData(matrix, obs=blood.obs, var=blood.var), checkpoint).to_dict() == expected, name
    assert inspect(blood[:, ::1], checkpoint).to_dict() == expected
    blood.write_h5ad(tmp_path / "blood.h5ad")
    backed = ad.read_h5ad(tmp_path / "blood.h5ad", backed="r")
    assert inspect(backed, checkpoint).to_dict() == expected
    backed.file.close()


def test_needs_no_weights(blood, checkpoint, tmp_path):
    for name in ("args.json", "vocab.json"):
        shutil.copy(checkpoint / name, tmp_path / name)
    report = sk.pp.inspect_annotation_data(blood, checkpoint=tmp_path)
    assert report.n_matched == sk.pp.inspect_annotation_data(blood, checkpoint=checkpoint).n_matched
    sk.pp.tokenize(blood, checkpoint=tmp_path)
    assert len(blood.uns["scgpt_tokens"]["vocabulary_sha256"]) == 64
    with pytest.raises(FileNotFoundError, match=r"lacks best_model\.pt"):
        sk.tl.embed(blood, checkpoint=tmp_path)


def test_needs_no_torch(blood, checkpoint, tmp_path):
    blood.write_h5ad(tmp_path / "blood.h5ad")
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['peft'] = None\n"
        "import anndata, scdlkit as sk\n"
        f"adata = anndata.read_h5ad({str(tmp_path / 'blood.h5ad')!r})\n"
        f"print(sk.inspect_annotation_data(adata, checkpoint={str(checkpoint)!r}).n_matched)\n"
        f"sk.pp.tokenize(adata, checkpoint={str(checkpoint)!r})\n"
        "for call in (sk.tl.embed, lambda a: sk.adapt_annotation(a), lambda a: sk.tl.predict(a, 'm'), lambda a: sk.AnnotationRunner):\n"
        "    try: call(adata)\n"
        "    except ImportError as error: print('pip install \"scdlkit[foundation]\"' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["705", "True", "True", "True", "True"], done.stderr


def test_labels_that_depend_on_the_groups_are_reported(blood, checkpoint):
    assert not any("donor" in text for text in inspect(blood, checkpoint, group_key="donor").warnings)
    blood.obs["plate"] = blood.obs["cell_type"].cat.codes.astype(str).to_numpy()
    report = inspect(blood, checkpoint, group_key="plate")
    strong, alone = [text for text in report.warnings if "'plate'" in text]
    assert "confounded" in strong and "4 of 4 classes occur in one value of 'plate' alone" in alone
    assert not report.feasible


def test_folds_are_checked(blood, checkpoint):
    assert inspect(blood, checkpoint, group_key="donor", cv=5).feasible
    report = inspect(blood, checkpoint, group_key="donor", cv=6)
    assert "6 folds by groups need at least 6 groups" in report.split_problems[0]
    with pytest.raises(ValueError, match="cv must be an integer of at least 2, found 1"):
        inspect(blood, checkpoint, cv=1)
