"""Fits on cells that are not in memory are the fits on the same cells in memory, bit for bit."""

from __future__ import annotations

import logging

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest

import scdlkit as sk
from scdlkit import _reader
from scdlkit.foundation import HeadConfig, LoRAConfig, TrainingConfig, stored_tokens
from scdlkit.foundation.expression_rows import ExpressionRows
from scdlkit.foundation.stored_tokens import StoredTokens, TokenArrays, TokenFiles

STRATEGIES = ("frozen_probe", "head", "lora")
BASELINES = ("pca_logreg", "logreg_genes")
MEASURED = ["fit_seconds", "embed_seconds", "peak_memory_mb"]


def fit(adata, checkpoint, *, output_dir=None, resume=False, **options):
    settings = {
        "checkpoint": checkpoint,
        "strategies": STRATEGIES,
        "baselines": BASELINES,
        "strategy_configs": {
            "head": HeadConfig(training=TrainingConfig(max_epochs=2)),
            "lora": LoRAConfig(training=TrainingConfig(max_epochs=1)),
            "pca_logreg": {"n_top_genes": 100, "n_components": 10, "C": 1.0},
            "logreg_genes": {"n_top_genes": 100, "C": 1.0},
        },
        "max_length": 120,
        "device": "cpu",
        "progress": False,
    }
    runner = sk.AnnotationRunner(**{**settings, **options})
    runner.fit_compare(adata, output_dir=output_dir, resume=resume)
    return runner


def assert_same(one, two, blood):
    for table in ("results_", "folds_", "history_", "per_class_", "differences_"):
        frames = [getattr(x, table).drop(columns=MEASURED, errors="ignore") for x in (one, two)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    for name in one.results_["strategy"]:
        first, second = (x._fitted[name].state_dict() for x in (one, two))
        assert all(first[key].equal(second[key]) for key in first | second), name
        first, second = (x.predict(blood, strategy=name) for x in (one, two))
        np.testing.assert_array_equal(first["probabilities"], second["probabilities"])


@pytest.fixture(scope="module")
def in_memory(_blood, checkpoint):
    return fit(_blood.copy(), checkpoint)


def test_a_fit_from_disk_is_the_fit_from_memory(blood, stored, checkpoint, in_memory, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(stored_tokens, "_PIECE", 50)
    monkeypatch.setattr(sk.settings, "temp_dir", tmp_path / "temporary")
    seen = []
    compare = sk.runner.compare
    monkeypatch.setattr(sk.runner, "compare", lambda *args, **kw: seen.append(args[1]) or compare(*args, **kw))
    with caplog.at_level(logging.INFO, "scdlkit"):
        runner = fit(stored(blood), checkpoint)
    (cells,) = seen
    assert isinstance(cells.tokens, StoredTokens) and isinstance(cells.tokens._place, TokenFiles)
    assert isinstance(cells.expression, ExpressionRows)
    (line,) = [record.message for record in caplog.records if "kept in files" in record.message]
    assert line.startswith(f"The tokens of 240 cells are kept in files in {tmp_path / 'temporary'} (0 MB)")
    assert not list((tmp_path / "temporary").iterdir())
    assert_same(runner, in_memory, blood)


def test_tokens_in_memory_are_there_once(blood, checkpoint, monkeypatch):
    kept, given = [], []
    keep, compare = _reader.keep_in_memory, sk.runner.compare
    monkeypatch.setattr(_reader, "keep_in_memory", lambda tokens: kept.append(keep(tokens)) or kept[-1])
    monkeypatch.setattr(sk.runner, "compare", lambda *args, **kw: given.append(args[1]) or compare(*args, **kw))
    config = {"head": HeadConfig(training=TrainingConfig(max_epochs=1))}
    fit(blood, checkpoint, strategies=("head",), baselines=(), strategy_configs=config)
    assert isinstance(kept[0]._place, TokenArrays)
    assert given[0].tokens._place is given[0].states._states._tokens._place is kept[0]._place


def test_too_many_tokens_for_the_memory_go_to_the_output_dir(blood, checkpoint, monkeypatch, caplog, tmp_path):
    options = {"strategies": ("frozen_probe", "lora"), "n_draws": 2}
    options["strategy_configs"] = {"lora": LoRAConfig(training=TrainingConfig(max_epochs=1))}
    expected = fit(blood, checkpoint, **options)
    assert "kept in files" not in caplog.text
    little = psutil.virtual_memory()._replace(available=2 * 5 * 240 * 119 * 4 // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    with caplog.at_level(logging.INFO, "scdlkit"):
        runner = fit(blood, checkpoint, output_dir=tmp_path / "out", **options)
    assert f"kept in files in {tmp_path / 'out'}" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training"]
    assert_same(runner, expected, blood)


@pytest.mark.parametrize("stored", ["lazy h5ad", "lazy zarr"], indirect=True)
def test_report_and_figures_of_lazy_cells(blood, stored, checkpoint, tmp_path):
    lazy = stored(blood)
    options = {"strategies": ("frozen_probe",), "baselines": (), "device": "cpu", "progress": False}
    sk.tl.adapt_annotation(lazy, "cell_type", checkpoint=checkpoint, output_dir=tmp_path / "out", **options)
    assert {"report.md", "embedding_umap.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    axes = sk.pl.annotation_umap(lazy, show=False)
    assert axes[0].get_title(loc="left").startswith("given: cell_type")
    plt.close(axes[0].figure)


def test_a_run_goes_on_wherever_its_cells_are(blood, stored, checkpoint, monkeypatch, tmp_path):
    first = fit(blood, checkpoint, output_dir=tmp_path / "out", strategies=("head", "lora"))
    from scdlkit.foundation import _one_fit

    monkeypatch.setattr(_one_fit.PeakMemory, "__enter__", lambda self: pytest.fail("fitted again"))
    again = fit(stored(blood), checkpoint, output_dir=tmp_path / "out", resume=True, strategies=("head", "lora"))
    pd.testing.assert_frame_equal(first.results_.drop(columns=MEASURED), again.results_.drop(columns=MEASURED))


@pytest.mark.parametrize("stored", ["zarr group"], indirect=True)
def test_a_full_disk_leaves_the_data_alone(blood, stored, checkpoint, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sk.settings, "temp_dir", tmp_path / "file")
    adata = stored(blood)
    with pytest.raises(OSError, match="tokens of the cells cannot be written.*temp_dir"):
        sk.tl.adapt_annotation(adata, checkpoint=checkpoint)
    assert "scgpt" not in adata.uns


@pytest.mark.parametrize("stored", ["backed"], indirect=True)
def test_the_report_and_label_efficiency_take_cells_from_disk(blood, stored, checkpoint):
    adata = stored(blood)
    found, expected = (sk.pp.inspect_annotation_data(x, checkpoint=checkpoint).to_dict() for x in (adata, blood))
    assert found == expected
    options = {"checkpoint": checkpoint, "strategies": ("frozen_probe",), "fractions": (0.5, 1.0), "progress": False}
    found, expected = (sk.tl.label_efficiency(x, **options) for x in (adata, blood))
    pd.testing.assert_frame_equal(found.drop(columns="fit_seconds"), expected.drop(columns="fit_seconds"))
