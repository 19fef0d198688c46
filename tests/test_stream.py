from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdlkit as sk
from scdlkit import _stream
from scdlkit._reader import CellReader
from scdlkit.foundation import LoRAConfig, TokenizerConfig, Tokens, TrainingConfig, ensure_checkpoint

STRATEGIES = ("frozen_probe", "lora")


@pytest.fixture(scope="module")
def runner(_blood, checkpoint):
    """Fitted on the first 160 cells: a strategy on the embedding, one inside the encoder, one on the genes."""
    runner = sk.AnnotationRunner(
        checkpoint=checkpoint,
        strategies=STRATEGIES,
        baselines=("pca_logreg",),
        lora_config=LoRAConfig(training=TrainingConfig(max_epochs=1)),
        device="cpu",
        progress=False,
    )
    runner.fit_compare(_blood[:160].copy())
    return runner


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of 50 cells; gives the numbers of cells that were tokenized at once."""
    monkeypatch.setattr(_stream, "CHUNK_CELLS", 50)
    seen, tokenize = [], CellReader.tokenize

    def record(self, expression):
        seen.append(expression.n_cells)
        return tokenize(self, expression)

    monkeypatch.setattr(CellReader, "tokenize", record)
    return seen


def as_frame(adata):
    return adata.obs if isinstance(adata.obs, pd.DataFrame) else adata.obs.to_memory()


def test_embed_in_pieces_is_embed_at_once(blood, stored, checkpoint, pieces):
    adata = stored(blood)
    sk.tl.embed(adata, checkpoint=checkpoint)
    assert len(pieces) >= 5 and max(pieces) <= 50 and sum(pieces) == 240
    pieces.clear()
    _stream.CHUNK_CELLS = 4096
    sk.tl.embed(blood, checkpoint=checkpoint)
    assert pieces == [240]
    np.testing.assert_allclose(np.asarray(adata.obsm["X_scgpt"]), blood.obsm["X_scgpt"], atol=1e-5)
    assert adata.uns["X_scgpt"]["params"] == blood.uns["X_scgpt"]["params"]


@pytest.mark.parametrize("strategy", [*STRATEGIES, "pca_logreg"])
def test_predict_in_pieces_is_predict_at_once(blood, stored, runner, pieces, strategy):
    adata = stored(blood)
    sk.tl.predict(adata, runner, strategy=strategy)
    assert max(pieces) <= 50 and sum(pieces) == 240
    _stream.CHUNK_CELLS = 4096
    sk.tl.predict(blood, runner, strategy=strategy)
    found = as_frame(adata)
    assert found["scgpt_label"].tolist() == blood.obs["scgpt_label"].tolist()
    assert found["scgpt_split"].tolist() == blood.obs["scgpt_split"].tolist()
    assert (found["scgpt_split"] == "train").sum() > 100  # recognised by content
    for key in ("X_scgpt_best", "scgpt_proba"):
        np.testing.assert_allclose(np.asarray(adata.obsm[key]), blood.obsm[key], atol=1e-5)


def test_tokens_of_pieces_are_the_tokens_of_the_whole(blood, stored, checkpoint):
    found = ensure_checkpoint(checkpoint)
    reader = CellReader(found, TokenizerConfig(max_length=100, seed=3), n_draws=2)
    whole = reader.tokenize(reader.choose(blood))
    pieces = [reader.tokenize(piece) for _, piece in reader.choose(stored(blood)).pieces(37)]
    for draw, tokens in enumerate(whole):
        assert Tokens.concatenate([some[draw] for some in pieces]).fingerprint() == tokens.fingerprint()


def test_a_bad_value_far_down_leaves_the_data_alone(blood, stored, runner, checkpoint, pieces, monkeypatch):
    from scdlkit.foundation import matrices

    monkeypatch.setattr(matrices, "SAMPLE_ROWS", 16)
    blood.X[150, blood.X[150].indices[0]] = -1
    adata = stored(blood)
    before = [set(part) for part in (as_frame(adata), adata.obsm, adata.uns)]
    for call in (
        lambda: sk.tl.embed(adata, checkpoint=checkpoint),
        lambda: sk.tl.predict(adata, runner),
    ):
        with pytest.raises(ValueError, match=f"1 negative.*cell '{blood.obs_names[150]}'"):
            call()
    assert before == [set(part) for part in (as_frame(adata), adata.obsm, adata.uns)]
    assert max(pieces) <= 50


def test_items_are_read_ahead_in_order():
    read = []

    def items():
        for i in range(4):
            read.append(i)
            yield i
        raise RuntimeError("at the end")

    got = []
    with pytest.raises(RuntimeError, match="at the end"):
        for item in _stream._read_ahead(items()):
            got.append(item)
    assert got == read == [0, 1, 2, 3]


def test_parts_are_put_together_in_any_order():
    rows = np.arange(20).reshape(10, 2)
    cuts = [slice(6, 10), slice(0, 4), slice(4, 6)]
    whole = _stream.put_together(((cut, {"rows": rows[cut], "codes": rows[cut, 0]}) for cut in cuts), 10)
    np.testing.assert_array_equal(whole["rows"], rows)
    np.testing.assert_array_equal(whole["codes"], rows[:, 0])


def test_results_in_lazily_read_cells_feed_get(blood, runner, tmp_path, through_disk):
    pytest.importorskip("xarray")
    through_disk(blood, tmp_path, "zarr")
    lazy = ad.experimental.read_lazy(tmp_path / "result.zarr")
    sk.tl.predict(lazy, runner)
    sk.tl.predict(blood, runner)
    pd.testing.assert_frame_equal(
        sk.get.predictions(lazy, split=None), sk.get.predictions(blood, split=None), check_names=False, atol=1e-5
    )
