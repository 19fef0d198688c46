"""What predicts pieces of a matrix: how often the encoder runs, in which precision, and what is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scdlkit as sk
from scdlkit import _reader
from scdlkit._prediction import close_calls
from scdlkit.foundation import LoRAConfig, TrainingConfig
from scdlkit.foundation.strategies import _encoder

STRATEGIES = ("frozen_probe", "lora")


@pytest.fixture(scope="module")
def fitted(_blood):
    runner = sk.AnnotationRunner(
        checkpoint="mini",
        strategies=STRATEGIES,
        baselines=("pca_logreg",),
        strategy_configs={
            "lora": LoRAConfig(training=TrainingConfig(max_epochs=4)),
            "pca_logreg": {"n_top_genes": 100, "n_components": 10, "C": 1.0},
        },
        max_length=120,
        device="cpu",
        progress=False,
    )
    runner.fit_compare(_blood[:160].copy())
    return runner


@pytest.fixture
def calls(monkeypatch):
    """Cells and precision of each time the encoder runs."""
    found = []
    for module in (_reader, _encoder):
        embed = module.embed_tokens

        def counted(encoder, tokens, *, embed=embed, **options):
            found.append((tokens.n_cells, options["precision"]))
            return embed(encoder, tokens, **options)

        monkeypatch.setattr(module, "embed_tokens", counted)
    return found


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), max_size=20))
def test_close_calls(rows):
    probabilities = np.array(rows).reshape(-1, 3)
    expected = [i for i, row in enumerate(rows) if 3 * sorted(row)[-2] > sorted(row)[-1]]
    assert close_calls(probabilities).tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_encoder_runs_once(fitted, blood, strategy, calls):
    fitted.predict(blood[160:].copy(), strategy=strategy)
    assert calls == [(80, "fp32")]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_close_calls_are_made_in_fp32(fitted, blood, strategy, precision, calls, monkeypatch):
    query = blood[160:].copy()
    exact = fitted.predict(query, strategy=strategy)
    with monkeypatch.context() as patch:
        patch.setattr("scdlkit._prediction.close_calls", lambda probabilities: np.empty(0, np.int64))
        patch.setattr(sk.settings, "_precision", precision)
        rounded = fitted.predict(query, strategy=strategy)
    calls.clear()
    found = fitted.predict(query, strategy=strategy, precision=precision)
    close = close_calls(rounded["probabilities"])
    assert 0 < len(close) < 80
    assert calls == [(80, precision), (len(close), "fp32")]
    np.testing.assert_array_equal(found["labels"], exact["labels"])
    others = np.setdiff1d(np.arange(80), close)
    for name in ("probabilities", "latent"):
        np.testing.assert_allclose(found[name][close], exact[name][close], atol=1e-5)
        np.testing.assert_array_equal(found[name][others], rounded[name][others])
        assert not np.array_equal(found[name][others], exact[name][others])


@pytest.mark.parametrize("precision", ["bf16", None])
def test_precision_of_a_run_over_a_file(fitted, blood, precision, calls, tmp_path, monkeypatch):
    query = blood[160:].copy()
    query.write_h5ad(tmp_path / "query.h5ad")
    fitted.save(tmp_path / "model")
    expected = fitted.predict(query, strategy="lora", precision=precision)["labels"]
    first = calls.copy()
    calls.clear()
    sk.tl.predict_file(
        tmp_path / "query.h5ad", tmp_path / "model", tmp_path / "out.csv", strategy="lora", precision=precision
    )
    assert calls == first and calls[0] == (80, precision or "fp32")
    assert pd.read_csv(tmp_path / "out.csv", index_col=0)["scgpt_label"].tolist() == expected.tolist()


def test_a_run_over_a_file_does_not_go_on_in_another_precision(fitted, blood, tmp_path, monkeypatch):
    blood[160:].copy().write_h5ad(tmp_path / "query.h5ad")
    fitted.save(tmp_path / "model")

    def run(precision):
        sk.tl.predict_file(
            tmp_path / "query.h5ad", tmp_path / "model", tmp_path / "out.csv", precision=precision, resume=True
        )

    with monkeypatch.context() as patch:
        patch.setattr("scdlkit.tl._file_run.FileRun.write", lambda *args, **kw: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("bf16")
    with pytest.raises(ValueError, match="precision"):
        run("fp32")
    run("bf16")


def test_a_baseline_needs_no_encoder_where_nobody_wants_the_embedding(fitted, blood, calls):
    expression = fitted._reader.choose(blood[160:].copy())
    work = fitted._predictor("pca_logreg", arrays=False)
    short = work(expression, work.prepare(expression))
    assert not calls
    work = fitted._predictor("pca_logreg", arrays=True)
    whole = work(expression, work.prepare(expression))
    assert len(calls) == 1
    for name in short:
        np.testing.assert_array_equal(short[name], whole[name])
