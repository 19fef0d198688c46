"""The script that makes ``mini``: batches, resuming and what it writes, on synthetic counts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

torch = pytest.importorskip("torch")
SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))

from pretraining import training  # noqa: E402
from pretraining.batches import BatchSource  # noqa: E402
from pretraining.config import PretrainingConfig  # noqa: E402
from pretraining.corpus import gene_vectors, read_corpus  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two data sets with 40 and 60 genes in common order and two kinds of cells, told apart by genes 0-9 and 10-19."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, n_cells, n_genes in (("a", 60, 40), ("b", 30, 60)):
        rate = np.full((n_cells, n_genes), 1.5)
        rate[::2, :10] = rate[1::2, 10:20] = 6
        rate[::2, 10:20] = rate[1::2, :10] = 0.1
        cells = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
        cells.var_names = [f"G{i:02d}" for i in range(n_genes)]
        cells.obs_names = [f"c{i}" for i in range(n_cells)]
        cells.write_h5ad(folder / f"{name}.h5ad")
    return read_corpus(folder, min_cells=5)


@pytest.fixture(scope="module")
def config():
    recipe = PretrainingConfig.read(SCRIPTS / "pretrain_mini.yaml")
    return dataclasses.replace(
        recipe,
        embsize=16,
        d_hid=16,
        nlayers=2,
        steps=6,
        batch_size=8,
        n_queries=20,
        genes_per_draw=(8, 16),
        max_asked=4,
        head_steps=2,
    )


def test_corpus_puts_all_data_sets_on_one_axis(corpus):
    assert corpus.counts.shape == (90, 63)
    assert list(corpus.vocab)[-3:] == ["<pad>", "<cls>", "<eoc>"]
    assert corpus.counts[:60, corpus.vocab["G45"]].nnz == 0  # the first data set lacks it
    assert corpus.counts[60:, corpus.vocab["G45"]].nnz > 0


def test_gene_vectors_are_close_where_genes_are_expressed_together(corpus):
    vectors = gene_vectors(corpus, 16, scale=2.0, seed=0)[:, 3:]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit[:20] @ unit[:20].T
    together = similarity[:10, :10][np.triu_indices(10, 1)]
    assert together.mean() > similarity[:10, 10:].mean() + 0.5


def test_batches_depend_on_seed_and_step_alone(corpus, config):
    source = BatchSource(corpus, config, training.encoder_config(config, len(corpus.vocab)))
    first, other, again = source.draw(3), source.draw(4), source.draw(3)
    for one, two in zip(first, again, strict=True):
        assert one == two if isinstance(one, int) else torch.equal(one, two)
    assert not torch.equal(first.query_ids, other.query_ids)


def test_masked_genes_are_hidden_and_asked(corpus, config):
    source = BatchSource(corpus, config, training.encoder_config(config, len(corpus.vocab)))
    batch = source.draw(0)
    known, asked = ~batch.padding[:, 1 : batch.n_known], ~batch.padding[:, batch.n_known :]
    assert known.any(1).all()
    assert asked.any()
    assert asked.sum(1).max() <= config.max_asked
    assert (batch.values[:, batch.n_known :][asked] == -1).all()
    assert (batch.values[:, 1 : batch.n_known][known] >= 1).all()
    assert (batch.targets[asked] >= 1).all()  # they are expressed
    assert (batch.query_targets == 0).any()  # and silent genes are asked too
    for ids, there in zip(batch.gene_ids, ~batch.padding, strict=True):
        assert len(torch.unique(ids[there])) == there.sum()  # known or masked, not both


def test_cells_are_read_as_the_encoder_reads_known_genes(corpus, config):
    source = BatchSource(corpus, config, training.encoder_config(config, len(corpus.vocab)))
    batch = source.draw(0)
    objective = training.build(corpus, dataclasses.replace(config, bfloat16=False)).eval()
    cells, outputs = objective.read(batch)
    known = batch.gene_ids[:, : batch.n_known], batch.values[:, : batch.n_known], batch.padding[:, : batch.n_known]
    torch.testing.assert_close(cells, objective.encoder.cls(*known))
    hidden = batch.padding.clone()
    hidden[:, batch.n_known :] = True  # nobody sees a masked gene
    with torch.no_grad():  # attention for training leaves out what is hidden
        whole = objective.encoder(batch.gene_ids, batch.values, hidden)[:, batch.n_known :]
    asked = ~batch.padding[:, batch.n_known :]
    torch.testing.assert_close(outputs[asked], whole[asked])
    objective.bfloat16 = True
    assert torch.nn.functional.cosine_similarity(objective.read(batch)[0], cells).min() > 0.999


def test_a_resumed_run_equals_an_uninterrupted_one(corpus, config, tmp_path, monkeypatch):
    whole = training.pretrain(corpus, config, tmp_path / "whole", log_every=2)
    draw = BatchSource.draw

    def stop_at_five(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return draw(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchSource, "draw", stop_at_five)
        training.pretrain(corpus, config, tmp_path / "parts", log_every=2, save_every=0)
    resumed = training.pretrain(corpus, config, tmp_path / "parts", log_every=2)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    curves = [(tmp_path / run / "curve.csv").read_text().splitlines() for run in ("whole", "parts")]
    assert [len(curve) for curve in curves] == [4, 4]


def test_a_run_of_another_recipe_is_not_resumed(corpus, config, tmp_path):
    short = dataclasses.replace(config, steps=2)
    training.pretrain(corpus, short, tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        training.pretrain(corpus, dataclasses.replace(short, seed=1), tmp_path)


def test_heads_and_encoder_move_and_the_export_is_strict(corpus, config, tmp_path):
    from scdlkit.foundation.weights import load_encoder, read_weights

    trained = training.pretrain(corpus, config, tmp_path / "run")
    for name, tensor in training.build(corpus, config).state_dict().items():
        if not name.endswith("row_of"):
            assert not torch.equal(tensor, trained.state_dict()[name]), name
    folder = training.export(trained, corpus, config, tmp_path / "checkpoint")
    loaded = load_encoder(folder)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained.encoder.state_dict()[name].half().float()), name
    heads = {name for name in read_weights(folder / "best_model.pt") if name.startswith(("decoder.", "mvc_decoder."))}
    assert len(heads) == 9


def test_embedded_checkpoint_names_the_recipe_of_its_config_file():
    from scdlkit.foundation.checkpoints import ensure_checkpoint

    written = ensure_checkpoint("mini").args()["recipe"]
    config = PretrainingConfig.read(SCRIPTS / "pretrain_mini.yaml").to_dict()
    common = written.keys() & config.keys() - {"loss_weights"}  # the losses have other names since
    assert {name: written[name] for name in common} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in config.items() if name in common
    }
