"""Input that cannot be used, through every function a user calls: an error that says why, and an unchanged AnnData."""

from __future__ import annotations

import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

import scdlkit as sk
from scdlkit.foundation.gene_names import human_symbols

FAST = {"strategies": ("frozen_probe",), "baselines": ()}


@pytest.fixture(scope="module")
def runner(_blood, checkpoint):
    return sk.tl.adapt_annotation(_blood.copy(), checkpoint=checkpoint, device="cpu", progress=False, **FAST)


def state(adata):
    """All that a call could change, by value."""
    frames = [frame.copy() for frame in (adata.obs, adata.var)]
    matrix = adata.X.copy() if hasattr(adata.X, "copy") else None
    return frames, matrix, {name: set(getattr(adata, name)) for name in ("obsm", "varm", "layers", "uns", "obsp")}


def assert_unchanged(adata, before):
    frames, matrix, keys = before
    for found, expected in zip((adata.obs, adata.var), frames, strict=True):
        pd.testing.assert_frame_equal(found, expected)
    if matrix is not None:
        difference = abs(sp.csr_matrix(adata.X) - sp.csr_matrix(matrix))
        # NaN where there was one
        assert difference.nnz == 0 or not (np.nan_to_num(difference.data, posinf=0) > 0).any()
    assert keys == {name: set(getattr(adata, name)) for name in keys}


def set_value(value):
    def change(adata):
        adata.X = adata.X.toarray()
        adata.X[5, 7] = value
        return adata

    return change


def renamed(names):
    def change(adata):
        adata.var_names = [names(i, name) for i, name in enumerate(adata.var_names)]
        return adata

    return change


UNUSABLE_CELLS = {
    "no cells": (lambda adata: adata[:0].copy(), "no cells|0 cells|empty"),
    "no genes": (lambda adata: adata[:, :0].copy(), "no genes|0 genes|empty"),
    "foreign genes": (renamed(lambda i, name: f"thing{i}"), r"0 of 765|matched"),
    "mouse genes": (renamed(lambda i, name: name.capitalize()), "(?i)mouse"),
    "mouse ids": (renamed(lambda i, name: f"ENSMUSG{i:011d}"), "(?i)mouse"),
    "NaN": (set_value(np.nan), "(?i)nan"),
    "infinite": (set_value(np.inf), "(?i)infinite"),
    "negative": (set_value(-1.0), "(?i)negative"),
}


@pytest.mark.parametrize(("change", "message"), UNUSABLE_CELLS.values(), ids=UNUSABLE_CELLS)
@pytest.mark.parametrize("call", ["inspect", "tokenize", "embed", "adapt", "predict"])
def test_cells_that_cannot_be_used(call, change, message, blood, checkpoint, runner):
    adata = change(blood)
    before = state(adata)
    functions = {
        "inspect": lambda: sk.pp.inspect_annotation_data(adata, "cell_type", checkpoint=checkpoint),
        "tokenize": lambda: sk.pp.tokenize(adata, checkpoint=checkpoint),
        "embed": lambda: sk.tl.embed(adata, checkpoint=checkpoint),
        "adapt": lambda: sk.tl.adapt_annotation(adata, checkpoint=checkpoint, **FAST),
        "predict": lambda: sk.tl.predict(adata, runner),
    }
    with pytest.raises(ValueError, match=message):
        functions[call]()
    assert_unchanged(adata, before)


def one_class(obs):
    return obs.assign(cell_type="B")


def class_of_one(obs):
    codes = obs["cell_type"].astype(str).to_numpy(dtype=object)
    codes[0] = "loner"
    return obs.assign(cell_type=codes)


UNUSABLE_LABELS = {
    "no such column": (lambda obs: obs.drop(columns="cell_type"), ValueError, "is not a column of adata.obs.*'donor'"),
    "all missing": (lambda obs: obs.assign(cell_type=np.nan), ValueError, "(?i)label"),
    "one class": (one_class, ValueError, "at least 2 different labels, found one"),
    "class of one cell": (class_of_one, ValueError, r"loner \(1\)"),
}


@pytest.mark.parametrize(("change", "error", "message"), UNUSABLE_LABELS.values(), ids=UNUSABLE_LABELS)
def test_labels_that_cannot_be_used(change, error, message, blood, checkpoint):
    blood.obs = change(blood.obs)
    before = state(blood)
    with pytest.raises(error, match=message):
        sk.tl.adapt_annotation(blood, "cell_type", checkpoint=checkpoint, **FAST)
    assert_unchanged(blood, before)


@pytest.mark.parametrize("versioned", [False, True])
def test_ensembl_ids_annotate_as_symbols_do(versioned, blood, checkpoint, runner):
    table = human_symbols()
    kept = blood[:, [bool(table.get(name)) for name in blood.var_names]].copy()
    assert kept.n_vars > 650
    ids = kept.copy()
    ids.var_names = [
        f"{table[name]}.{i % 9 + 1}" if versioned else table[name] for i, name in enumerate(kept.var_names)
    ]
    report = sk.pp.inspect_annotation_data(ids, "cell_type", checkpoint=checkpoint)
    assert report.n_matched == sk.pp.inspect_annotation_data(kept, "cell_type", checkpoint=checkpoint).n_matched
    for adata in (kept, ids):
        sk.tl.predict(adata, runner)
    np.testing.assert_array_equal(ids.obs["scgpt_label"], kept.obs["scgpt_label"])
    np.testing.assert_allclose(ids.obsm["X_scgpt_best"], kept.obsm["X_scgpt_best"], atol=1e-5)
    adapted = sk.tl.adapt_annotation(ids, checkpoint=checkpoint, key_added="ids", **FAST)
    again = sk.tl.adapt_annotation(kept, checkpoint=checkpoint, key_added="ids", **FAST)
    assert adapted.results_["val_macro_f1"].tolist() == pytest.approx(again.results_["val_macro_f1"].tolist())


FORMS = {
    "csc": sp.csc_matrix,
    "dense": lambda matrix: matrix.toarray(),
    "float64": lambda matrix: matrix.astype(np.float64),
    "csr array": sp.csr_array,
    "64-bit indices": lambda matrix: _wide(matrix),
}


def _wide(matrix):
    wide = matrix.copy()
    wide.indptr, wide.indices = wide.indptr.astype(np.int64), wide.indices.astype(np.int64)
    return wide


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_the_matrix_gives_one_annotation(form, blood, checkpoint, runner):
    expected = runner.predict(blood)
    other = ad.AnnData(form(blood.X), obs=blood.obs, var=blood.var)
    found = runner.predict(other)
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-5)


def test_integer_counts(checkpoint):
    rng = np.random.default_rng(0)
    names = sc.datasets.pbmc68k_reduced().raw.var_names
    codes = np.arange(90) % 3
    rates = rng.gamma(0.5, 1.0, (3, len(names)))[codes]
    counts = rng.poisson(rates)
    results = []
    for dtype in (np.int16, np.int64, np.uint8, np.float32):
        adata = ad.AnnData(counts.astype(dtype), var=pd.DataFrame(index=names))
        adata.obs_names = [f"c{i}" for i in range(90)]
        adata.obs["cell_type"] = pd.Categorical(np.array(["a", "b", "c"])[codes])
        sk.tl.adapt_annotation(adata, checkpoint=checkpoint, batch_size=1, **FAST)
        results.append(adata.obs["scgpt_label"].tolist())
    assert all(labels == results[0] for labels in results)


def damaged(kind, source, target):
    shutil.copytree(source, target)
    weights = target / "best_model.pt"
    content = weights.read_bytes()
    if kind == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "foreign":
        weights.write_bytes(b"PK\x03\x04 this is no checkpoint")
    elif kind == "vocabulary of another":
        (target / "vocab.json").write_text('{"<pad>": 0, "<cls>": 1, "<eoc>": 2, "CD3E": 3}')
    elif kind == "no vocabulary":
        (target / "vocab.json").unlink()
    return target


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "vocabulary of another", "no vocabulary"])
def test_damaged_checkpoints(kind, blood, checkpoint, tmp_path):
    folder = damaged(kind, checkpoint, tmp_path / "checkpoint")
    before = state(blood)
    for call in (
        lambda: sk.tl.adapt_annotation(blood, checkpoint=folder, **FAST),
        lambda: sk.tl.embed(blood, checkpoint=folder),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            call()
        assert str(folder) in str(caught.value) or "genes" in str(caught.value)
    assert_unchanged(blood, before)


def test_a_model_refuses_a_checkpoint_that_was_damaged_since(blood, checkpoint, tmp_path):
    good = shutil.copytree(checkpoint, tmp_path / "good")
    runner = sk.tl.adapt_annotation(blood, checkpoint=good, **FAST)
    runner.save(tmp_path / "model")
    content = bytearray((good / "best_model.pt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    (good / "best_model.pt").write_bytes(bytes(content))
    before = state(blood)
    with pytest.raises(ValueError, match="sha256"):
        sk.tl.predict(blood, tmp_path / "model")
    assert_unchanged(blood, before)


@pytest.mark.parametrize("key_added", ["", "a/b", None, 3])
def test_keys_that_no_file_could_hold(blood, checkpoint, tmp_path, key_added):
    calls = [
        lambda: sk.tl.embed(blood, checkpoint=checkpoint, key_added=key_added),
        lambda: sk.tl.embed_file(blood, tmp_path / "x.npy", checkpoint=checkpoint, key_added=key_added),
        lambda: sk.tl.adapt_annotation(blood, checkpoint=checkpoint, key_added=key_added, **FAST),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="key_added must be a name without '/', found"):
            call()
    assert not list(tmp_path.iterdir()) and not blood.obsm
