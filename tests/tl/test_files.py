from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdlkit as sk
from scdlkit import _stream
from scdlkit.foundation._lock import exclusive

COLUMNS = ["scgpt_label", "scgpt_label_code", "scgpt_label_confidence", "scgpt_split"]


@pytest.fixture(scope="module")
def model(_blood, checkpoint, tmp_path_factory):
    """A saved model, fitted on the first 160 cells."""
    runner = sk.AnnotationRunner(
        checkpoint=checkpoint, strategies=("frozen_probe",), baselines=("pca_logreg",), device="cpu", progress=False
    )
    runner.fit_compare(_blood[:160].copy())
    return runner.save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    monkeypatch.setattr(_stream, "CHUNK_CELLS", 50)


@pytest.fixture
def annotated(blood, model):
    """What the function for cells in memory gives."""
    sk.tl.predict(blood, model)
    return blood


@pytest.fixture
def files(_blood, tmp_path):
    """The cells as h5ad and zarr, with a layer and a column that must survive."""
    cells = _blood.copy()
    cells.layers["log"] = cells.X
    cells.uns["scgpt_label_colors"] = np.array(["#000000"])
    cells.obsm["X_pca"] = np.ones((240, 2), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the format of zarr
        cells.write_zarr(tmp_path / "cells.zarr")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return {kind: tmp_path / f"cells.{kind}" for kind in ("h5ad", "zarr")}


def assert_alike(obs, annotated):
    expected = annotated.obs[COLUMNS]
    assert obs.index.tolist() == expected.index.tolist()
    for name in ("scgpt_label", "scgpt_split"):
        assert obs[name].astype(str).tolist() == expected[name].astype(str).tolist()
    assert obs["scgpt_label_code"].tolist() == expected["scgpt_label_code"].tolist()
    np.testing.assert_allclose(obs["scgpt_label_confidence"], expected["scgpt_label_confidence"], atol=1e-5)


def only_result(folder: Path, *names: str):
    """No half-written or left-over file stands beside the result."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_labels_as_parquet(files, model, annotated, kind, tmp_path):
    out = tmp_path / "new" / "labels.parquet"
    counts = sk.tl.predict_file(files[kind], model, out)
    table = pd.read_parquet(out)
    assert list(table.columns) == COLUMNS
    assert isinstance(table["scgpt_label"].dtype, pd.CategoricalDtype)
    assert_alike(table, annotated)
    assert counts.to_dict() == annotated.obs["scgpt_label"].value_counts().to_dict()
    assert counts.is_monotonic_decreasing
    only_result(out.parent, "labels.parquet")


def test_labels_as_csv(files, model, annotated, tmp_path):
    out = tmp_path / "new" / "labels.csv"
    sk.tl.predict_file(str(files["zarr"]), str(model), str(out), strategy="pca_logreg", key_added="mine")
    sk.tl.predict(annotated, model, strategy="pca_logreg")
    table = pd.read_csv(out, index_col="cell")
    table.columns = table.columns.str.replace("mine", "scgpt")
    assert_alike(table, annotated)
    only_result(out.parent, "labels.csv")


def test_arrays_in_parquet(files, model, annotated, tmp_path):
    sk.tl.predict_file(files["h5ad"], model, tmp_path / "all.parquet", arrays=True)
    table = pd.read_parquet(tmp_path / "all.parquet")
    assert_alike(table, annotated)
    for key in ("X_scgpt_best", "scgpt_proba"):
        np.testing.assert_allclose(np.stack(table[key]), annotated.obsm[key], atol=1e-5)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_copy_of_the_cells_with_results(files, model, annotated, kind, tmp_path):
    out = tmp_path / "new" / f"annotated.{kind}"
    sk.tl.predict_file(files[kind], model, out)
    read = getattr(ad, f"read_{kind}")
    before, after = read(files[kind]), read(out)
    assert_alike(after.obs, annotated)
    for key in ("X_scgpt_best", "scgpt_proba"):
        np.testing.assert_allclose(after.obsm[key], annotated.obsm[key], atol=1e-5)
    pd.testing.assert_frame_equal(after.obs[before.obs.columns], before.obs)
    assert (after.X != before.X).nnz == 0 and (after.layers["log"] != before.layers["log"]).nnz == 0
    np.testing.assert_array_equal(after.obsm["X_pca"], before.obsm["X_pca"])
    assert "scgpt_label_colors" not in after.uns and "scgpt_label_colors" in before.uns
    assert "scgpt_label" not in before.obs
    assert sk.get.strategy_table(after).equals(sk.get.strategy_table(annotated))
    assert sk.get.predictions(after, split=None).shape == (240, 4)
    only_result(out.parent, out.name)
    # again, over what is there, with another strategy
    sk.tl.predict_file(out, model, out, strategy="pca_logreg")
    assert read(out).uns["scgpt"]["params"]["strategy"] == "pca_logreg"
    only_result(out.parent, out.name)
    if kind == "zarr":
        pytest.importorskip("xarray")  # reads the gathered metadata
        assert "scgpt_label" in ad.experimental.read_lazy(out).obs


@pytest.mark.parametrize("ending", ["npy", "parquet", "h5ad", "zarr"])
def test_embed_file(files, checkpoint, blood, ending, tmp_path):
    sk.tl.embed(blood, checkpoint=checkpoint, random_state=3)
    out = tmp_path / "new" / f"out.{ending}"
    sk.tl.embed_file(files.get(ending, files["zarr"]), out, checkpoint=checkpoint, random_state=3)
    if ending == "npy":
        found = np.load(out, mmap_mode="r")
    elif ending == "parquet":
        found = np.stack(pd.read_parquet(out)["X_scgpt"])
    else:
        back = getattr(ad, f"read_{ending}")(out)
        found = back.obsm["X_scgpt"]
        assert back.uns["X_scgpt"]["params"] == blood.uns["X_scgpt"]["params"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, blood.obsm["X_scgpt"], atol=1e-5)
    only_result(out.parent, out.name)


def test_any_anndata(stored, _blood, model, annotated, tmp_path):
    sk.tl.predict_file(stored(_blood.copy()), model, tmp_path / "labels.csv")
    assert_alike(pd.read_csv(tmp_path / "labels.csv", index_col="cell"), annotated)


def test_cells_without_known_genes(files, model, tmp_path, caplog):
    cells = ad.read_h5ad(files["h5ad"])
    values = cells.X.toarray()
    values[7] = 0
    cells.X = sp.csr_matrix(values)
    cells.write_h5ad(files["h5ad"])
    counts = sk.tl.predict_file(files["h5ad"], model, tmp_path / "labels.parquet")
    assert counts["unassigned"] == 1 and counts.sum() == 240
    assert "1 cells have no gene that the checkpoint knows: 'unassigned'" in caplog.text
    row = pd.read_parquet(tmp_path / "labels.parquet").iloc[7]
    assert row["scgpt_label"] == "unassigned" and np.isnan(row["scgpt_label_confidence"])


# --- interrupted -------------------------------------------------------------------------------------------------------


def stop_after(monkeypatch, n):
    """Fail on the piece after the n-th; gives the number of pieces that were worked on."""
    from scdlkit._prediction import Predictor

    done, work = [], Predictor.__call__

    def limited(self, piece, prepared):
        if len(done) == n:
            raise KeyboardInterrupt
        done.append(piece.n_cells)
        return work(self, piece, prepared)

    monkeypatch.setattr(Predictor, "__call__", limited)
    return done


@pytest.mark.parametrize("ending", ["parquet", "csv", "h5ad"])
def test_a_run_goes_on_where_it_ended(files, model, annotated, ending, tmp_path, monkeypatch):
    out = tmp_path / "new" / f"labels.{ending}"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sk.tl.predict_file(files["h5ad"], model, out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"results of a run that did not end: go on with it \(resume=True"):
        sk.tl.predict_file(files["h5ad"], model, out)
    with pytest.raises(ValueError, match="results of another run \\(other model, strategy\\)"):
        sk.tl.predict_file(files["h5ad"], model, out, strategy="pca_logreg", resume=True)
    with monkeypatch.context() as patch:
        done = stop_after(patch, 100)
        sk.tl.predict_file(files["h5ad"], model, out, resume=True)
    assert done == [50, 40]
    if ending == "h5ad":
        assert_alike(ad.read_h5ad(out).obs, annotated)
    else:
        assert_alike(pd.read_parquet(out) if ending == "parquet" else pd.read_csv(out, index_col="cell"), annotated)
    only_result(out.parent, out.name)


def test_other_cells_are_another_run(files, model, tmp_path, monkeypatch):
    out = tmp_path / "labels.csv"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sk.tl.predict_file(files["h5ad"], model, out)
    cells = ad.read_h5ad(files["h5ad"])
    cells.X[3, cells.X[3].indices[0]] *= 2
    cells.write_h5ad(files["h5ad"])
    with pytest.raises(ValueError, match=r"results of another run \(other cells\)"):
        sk.tl.predict_file(files["h5ad"], model, out, resume=True)


def test_two_runs_do_not_write_one_target(files, model, tmp_path):
    """Else pieces of two models would be put together as those of one."""
    out = tmp_path / "new" / "labels.csv"
    folder = out.with_name(".labels.csv-unfinished")
    folder.mkdir(parents=True)
    with exclusive(folder / "lock", "testing"):
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"Another process is writing .*labels\.csv, and has its pieces in"):
                sk.tl.predict_file(files["h5ad"], model, out, resume=resume)
        assert not out.exists()
    sk.tl.predict_file(files["h5ad"], model, out)
    only_result(out.parent, out.name)


def test_a_damaged_piece_is_named(files, model, tmp_path, monkeypatch):
    out = tmp_path / "labels.csv"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sk.tl.predict_file(files["h5ad"], model, out)
    piece = tmp_path / ".labels.csv-unfinished" / "000000000050-000000000100.npz"
    piece.write_bytes(piece.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"000000000050-000000000100.npz is damaged .*: remove it"):
        sk.tl.predict_file(files["h5ad"], model, out, resume=True)
    piece.unlink()
    sk.tl.predict_file(files["h5ad"], model, out, resume=True)
    assert len(pd.read_csv(out)) == 240


KILLED = """
import sys
from scdlkit import _stream, cli
_stream.CHUNK_CELLS = 8
cli.app(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_again_and_again(files, model, annotated, tmp_path):
    """A process that is killed three times leaves, when it ends, what one that was never interrupted leaves."""
    whole, out = tmp_path / "whole.parquet", tmp_path / "new" / "labels.parquet"
    sk.tl.predict_file(files["zarr"], model, whole)
    command = [sys.executable, "-c", KILLED, "predict", files["zarr"], model, "--out", out, "--resume"]
    unfinished = out.with_name(".labels.parquet-unfinished")
    there = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(list(unfinished.glob("*.npz"))) <= there and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        there = len(list(unfinished.glob("*.npz")))
        assert 0 < there < 30
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Goes on where an earlier run ended" in done.stderr
    pd.testing.assert_frame_equal(pd.read_parquet(out), pd.read_parquet(whole), atol=1e-5)
    only_result(out.parent, out.name)


# --- what is refused, before any work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "out", "options", "error", "message"),
    [
        ("cells.h5ad", "labels.txt", {}, ValueError, "out must end in .parquet, .csv, .h5ad, .zarr, found"),
        ("cells.txt", "labels.csv", {}, ValueError, "cells must end in .h5ad or .zarr"),
        ("gone.zarr", "labels.csv", {}, FileNotFoundError, "gone.zarr does not exist"),
        ("cells.h5ad", "out.zarr", {}, ValueError, r"cells is a .h5ad file: give a .zarr file"),
        ("cells.h5ad", "labels.csv", {"arrays": True}, ValueError, "a .csv table cannot hold them"),
        ("cells.zarr", "full.zarr", {}, ValueError, "full.zarr is a folder and no result of an earlier run"),
        ("cells.h5ad", "labels.csv", {"strategy": "lora"}, ValueError, "strategy='lora' is not fitted"),
        ("cells.h5ad", "labels.csv", {"client": "tcp://"}, TypeError, "client must be a dask.distributed.Client"),
    ],
)
def test_refused(files, model, tmp_path, cells, out, options, error, message):
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "thesis.docx").write_text("years of work")
    with pytest.raises(error, match=message):
        sk.tl.predict_file(tmp_path / cells, model, tmp_path / out, **options)
    assert (tmp_path / "full.zarr" / "thesis.docx").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_cells_that_are_no_cells(model, tmp_path):
    with pytest.raises(TypeError, match="cells must be a path or an AnnData, found int"):
        sk.tl.predict_file(3, model, tmp_path / "labels.csv")


def test_learnt_labels_are_not_overwritten(files, model, tmp_path):
    runner = sk.AnnotationRunner.load(model)
    runner.label_key_ = "scgpt_label"
    cells = ad.read_h5ad(files["h5ad"])
    cells.obs["scgpt_label"] = cells.obs["cell_type"]
    cells.write_h5ad(files["h5ad"])
    with pytest.raises(ValueError, match=r"would overwrite .obs\['scgpt_label'\]"):
        sk.tl.predict_file(files["h5ad"], runner, tmp_path / "out.h5ad")
    sk.tl.predict_file(files["h5ad"], runner, tmp_path / "out.csv")


def test_without_pyarrow(files, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "scdlkit\[parquet\]"'):
        sk.tl.predict_file(files["h5ad"], model, tmp_path / "labels.parquet")
    sk.tl.predict_file(files["h5ad"], model, tmp_path / "labels.csv")


def test_several_processes_are_refused(files, model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"Several processes were launched together .* pass client="):
        sk.tl.predict_file(files["h5ad"], model, tmp_path / "labels.csv")
