"""Two worker processes do what one process does, also when one of them is killed in between."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdlkit as sk
from scdlkit import _cluster, _stream
from scdlkit.foundation import LoRAConfig, TrainingConfig

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def runner(_blood, checkpoint):
    runner = sk.AnnotationRunner(
        checkpoint=checkpoint,
        strategies=("frozen_probe", "lora"),
        baselines=("pca_logreg",),
        lora_config=LoRAConfig(training=TrainingConfig(max_epochs=1)),
        device="cpu",
        progress=False,
    )
    runner.fit_compare(_blood[:160].copy())
    return runner


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    monkeypatch.setattr(_stream, "CHUNK_CELLS", 30)


def annotated(blood, runner, **options):
    sk.tl.predict(blood, runner, **options)
    return blood


def assert_alike(found, expected):
    obs = found.obs if isinstance(found.obs, pd.DataFrame) else found.obs.to_memory()
    for name in ("scgpt_label", "scgpt_split"):
        assert obs[name].tolist() == expected.obs[name].tolist()
    for key in ("X_scgpt_best", "scgpt_proba"):
        np.testing.assert_allclose(np.asarray(found.obsm[key]), expected.obsm[key], atol=1e-5)


@pytest.mark.parametrize("strategy", ["frozen_probe", "lora", "pca_logreg"])
def test_predict(_blood, stored, runner, client, strategy):
    """In memory the rows are sent, of dask arrays the workers compute them."""
    expected = annotated(_blood.copy(), runner, strategy=strategy)
    for adata in (_blood.copy(), stored(_blood.copy())):
        assert_alike(annotated(adata, runner, strategy=strategy, client=client), expected)


def test_embed(_blood, stored, checkpoint, client):
    expected, spread = _blood.copy(), stored(_blood.copy())
    sk.tl.embed(expected, checkpoint=checkpoint, n_draws=2, max_length=100)
    sk.tl.embed(spread, checkpoint=checkpoint, n_draws=2, max_length=100, client=client)
    np.testing.assert_allclose(np.asarray(spread.obsm["X_scgpt"]), expected.obsm["X_scgpt"], atol=1e-5)


@pytest.fixture
def dask_cells(_blood):
    cells = _blood.copy()
    cells.X = pytest.importorskip("dask.array").from_array(cells.X, chunks=(30, -1))
    return cells


def test_dask_arrays_go_where_dask_would_compute_them(_blood, dask_cells, runner, checkpoint, client, caplog):
    expected = annotated(_blood.copy(), runner)
    client.run(_cluster._built.cache_clear)
    with caplog.at_level("INFO", "scdlkit"):
        assert_alike(annotated(dask_cells.copy(), runner), expected)
        sk.tl.embed(dask_cells, checkpoint=checkpoint)
    assert caplog.text.count("so the 2 workers of") == 2
    info = client.run(lambda: _cluster._built.cache_info()._asdict())
    assert sum(found["hits"] + found["misses"] for found in info.values()) == 2 * 8


def test_other_cells_and_clients_that_do_not_wait_stay_here(_blood, dask_cells, runner, client, monkeypatch):
    in_memory, in_dask = (runner._reader.choose(cells) for cells in (_blood, dask_cells))
    assert _cluster.chosen_client(None, in_dask) is client
    assert _cluster.chosen_client(None, in_memory) is None
    assert _cluster.chosen_client(client, in_memory) is client
    assert _cluster.chosen_client(False, in_dask) is None
    monkeypatch.setattr(distributed.Client, "asynchronous", True)
    assert _cluster.chosen_client(None, in_dask) is None


def test_a_fit_annotates_where_the_model_is(dask_cells, checkpoint, client, monkeypatch):
    monkeypatch.setattr("scdlkit._recipes.spread_out", lambda *args, **kwargs: pytest.fail("on the cluster"))
    sk.tl.adapt_annotation(dask_cells, "cell_type", checkpoint=checkpoint, strategies=("frozen_probe",), baselines=())
    assert "scgpt_label" in dask_cells.obs


@pytest.fixture
def file(_blood, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the format of zarr
        _blood.write_zarr(tmp_path / "cells.zarr")
    return tmp_path / "cells.zarr"


def kill_one_worker(client, monkeypatch):
    """Kill a worker process with work on its hands when the second piece has come back; gives its process id."""
    killed, answered = [], []
    result = distributed.Future.result

    def answer(self, *args, **kwargs):
        answered.append(self)
        if len(answered) == 2:
            working = {name for name, tasks in client.processing().items() if tasks}
            name = sorted(working or client.nthreads())[0]
            killed.append(client.run(os.getpid, workers=[name])[name])
            os.kill(killed[0], signal.SIGKILL)
        return result(self, *args, **kwargs)

    monkeypatch.setattr(distributed.Future, "result", answer)
    return killed


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("how", ["rows are sent", "dask", "file"])
def test_a_worker_is_killed(_blood, file, runner, client, monkeypatch, tmp_path, how):
    expected = annotated(_blood.copy(), runner)
    before = set(client.run(os.getpid).values())
    killed = kill_one_worker(client, monkeypatch)
    if how == "file":
        sk.tl.predict_file(file, runner, tmp_path / "labels.parquet", client=client)
        labels = pd.read_parquet(tmp_path / "labels.parquet")["scgpt_label"]
        assert labels.tolist() == expected.obs["scgpt_label"].tolist()
    else:
        cells = _blood.copy() if how == "rows are sent" else ad.experimental.read_lazy(file)
        if how == "dask":
            cells.X = cells.X.rechunk((20, -1))
        assert_alike(annotated(cells, runner, client=client), expected)
    assert killed and killed[0] in before
    client.wait_for_workers(2, timeout=120)
    assert killed[0] not in client.run(os.getpid).values()


def test_a_run_begun_alone_ends_on_the_cluster(_blood, file, runner, client, tmp_path, monkeypatch):
    out = tmp_path / "labels.csv"
    put = _stream.work_through

    def three(*args, **kwargs):
        for number, part in enumerate(put(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patch:
        patch.setattr("scdlkit._recipes.work_through", three)
        with pytest.raises(KeyboardInterrupt):
            sk.tl.predict_file(file, runner, out)
    sk.tl.predict_file(file, runner, out, client=client, resume=True)
    expected = annotated(_blood.copy(), runner).obs["scgpt_label"]
    assert pd.read_csv(out, index_col="cell")["scgpt_label"].tolist() == expected.tolist()


def test_every_worker_loads_the_model_once(_blood, file, runner, client, tmp_path):
    client.run(_cluster._built.cache_clear)
    sk.tl.predict_file(file, runner, tmp_path / "labels.csv", client=client)
    info = client.run(lambda: _cluster._built.cache_info()._asdict())
    assert sum(found["hits"] + found["misses"] for found in info.values()) == 8
    assert all(found["misses"] <= 1 for found in info.values())


def test_bad_values_are_named(_blood, stored, runner, client, monkeypatch):
    from scdlkit.foundation import matrices

    monkeypatch.setattr(matrices, "SAMPLE_ROWS", 16)
    cells = _blood.copy()
    cells.X[150, cells.X[150].indices[0]] = -1
    with pytest.raises(ValueError, match=f"1 negative.*cell '{cells.obs_names[150]}'"):
        annotated(stored(cells), runner, client=client)


def test_another_model_in_the_folder_is_noticed(_blood, runner, client, checkpoint, tmp_path):
    folder = runner.save(tmp_path / "model")
    other = sk.AnnotationRunner(checkpoint=checkpoint, strategies=("frozen_probe",), baselines=(), random_state=7)
    other.fit_compare(_blood[:160].copy())
    other.save(folder)
    with pytest.raises(ValueError, match="holds another model than the one in use"):
        annotated(_blood.copy(), runner, strategy="frozen_probe", client=client)
    runner.save(tmp_path / "again")


def test_no_client(_blood, runner, checkpoint, monkeypatch):
    for client, found in ((3, "int"), ("tcp://127.0.0.1:8786", "str")):
        with pytest.raises(TypeError, match=rf"must be a dask.distributed.Client.* found {found}"):
            sk.tl.predict(_blood.copy(), runner, client=client)
    monkeypatch.setattr("scdlkit._optional.is_installed", lambda name: name != "distributed")
    with pytest.raises(ImportError, match=r'client= needs the extra: pip install "scdlkit\[dask\]"'):
        sk.tl.embed(_blood.copy(), checkpoint=checkpoint, client=3)


def test_names_of_matrices_in_files():
    assert [_cluster._name_in_file(name) for name in ("X", "raw.X", "layers['a\\'b']")] == ["X", "raw/X", "layers/a'b"]
    assert Path(_cluster.FileRows(Path("a"), "X", (0, 1)).path) == Path("a")
