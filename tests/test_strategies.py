"""Every strategy through the runner, as a user calls it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import anndata as ad
import numpy as np
import peft
import pytest

import scdlkit as sk
from scdlkit.foundation import (
    AnyPeftConfig,
    LoRAConfig,
    TokenizerConfig,
    TrainingConfig,
    available_strategies,
    get_strategy,
    load_encoder,
)
from scdlkit.foundation.batching import collate
from scdlkit.foundation.model import AnnotationHead
from scdlkit.foundation.strategies import all_baselines
from scdlkit.foundation.tokens import tokenize
from scdlkit.foundation.vocabulary import Vocabulary
from scdlkit.foundation.weights import read_weights

NAMES = [name for name in available_strategies("strategy") if name != "any_peft"]
BASELINES = all_baselines()


def short(name: str):
    """The strategy's defaults, two epochs."""
    config = get_strategy(name)().config
    training = getattr(config, "training", None)
    return config if training is None else replace(config, training=replace(training, max_epochs=2))


VERA = peft.VeraConfig(r=8, target_modules=["q", "v"])
OWN = {
    "my_vera": AnyPeftConfig.of(VERA, training=TrainingConfig(max_epochs=2)),
    "wide": LoRAConfig(rank=16, training=short("lora").training),
}


@pytest.fixture(scope="module")
def fitted(_blood, checkpoint):
    runner = sk.AnnotationRunner(
        checkpoint=checkpoint,
        strategies=(*NAMES, *OWN),
        baselines="all",
        strategy_configs={name: short(name) for name in NAMES} | OWN,
        device="cpu",
        progress=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Strategy .* predicts")  # two epochs may teach one class alone
        runner.fit_compare(_blood[:100].copy())
    return runner, _blood[200:].copy()


def test_all_names_the_strategies_of_the_registry(checkpoint):
    runner = sk.AnnotationRunner(checkpoint=checkpoint, strategies="all")
    assert {s.name for s in runner._strategies} == {*NAMES, "pca_logreg"}
    runner = sk.AnnotationRunner(checkpoint=checkpoint, baselines="all")
    assert {s.name for s in runner._strategies} == {"frozen_probe", "head", *BASELINES}
    assert {"pca_logreg", "logreg_genes", "knn_frozen"} <= set(BASELINES)
    expected = {"frozen_probe", "head", "full_finetune", "lora", "adapter", "prefix_tuning", "ia3", "bitfit"}
    assert set(NAMES) == expected


def test_one_table_for_all(fitted):
    runner, _ = fitted
    table = runner.results_.set_index("strategy")
    assert set(table.index) == {*NAMES, *OWN, *BASELINES}
    assert (table["error"] == "").all() and table["val_macro_f1"].notna().all()
    assert (
        table.loc["full_finetune", "n_trainable"] > table.loc["lora", "n_trainable"] > table.loc["ia3", "n_trainable"]
    )
    assert set(runner.history_["strategy"]) >= {"lora", "my_vera"}
    without = {"pca_logreg", "logreg_genes", "celltypist"}
    assert set(table.index[~table["uses_encoder"]]) == without.intersection(BASELINES)


@pytest.mark.parametrize("name", [*NAMES, *OWN, *BASELINES])
def test_each_is_kept_saved_and_loaded(fitted, name, tmp_path):
    runner, query = fitted
    out = runner.predict(query, strategy=name)
    path = runner.save(tmp_path / "model")
    again = sk.AnnotationRunner.load(path, device="cpu", progress=False).predict(query, strategy=name)
    np.testing.assert_allclose(again["probabilities"], out["probabilities"], atol=1e-5)
    np.testing.assert_allclose(again["latent"], out["latent"], atol=1e-5)
    frozen = runner.predict(query, strategy="frozen_probe")["latent"]
    changed = np.abs(out["latent"] - frozen).max() > 1e-4
    assert changed == (name not in ("frozen_probe", "head", *BASELINES))
    annotated = ad.AnnData(query.X, obs=query.obs, var=query.var)
    runner.annotate_adata(annotated, strategy=name)
    assert annotated.uns["scgpt"]["params"]["strategy"] == name


@pytest.mark.parametrize("name", ["frozen_probe", "head", "lora", "ia3", "bitfit", "full_finetune", "wide"])
def test_standalone_checkpoint_gives_the_same_probabilities(fitted, name, tmp_path):
    """Through the official layout: our encoder on the merged weights, and the head under upstream's names."""
    import torch

    runner, query = fitted
    folder = runner.save(tmp_path / name, standalone=True, strategy=name)
    encoder, vocabulary = load_encoder(folder), Vocabulary.from_json(folder / "vocab.json")
    ids = np.array([vocabulary.tokens.get(gene, -1) for gene in query.var_names])
    tokens = tokenize(query.X, ids, TokenizerConfig(seed=42))
    state = {
        key.replace("cls_decoder._decoder.", "hidden.").replace("cls_decoder.out_layer.", "out."): value
        for key, value in read_weights(folder / "best_model.pt").items()
        if key.startswith("cls_decoder.")
    }
    args = sk.foundation.ensure_checkpoint(folder).args()
    head = AnnotationHead(32, 4, n_layers=args["n_layers_cls"])
    head.load_state_dict(state)
    with torch.inference_mode():
        batch = collate(tokens, cls_id=vocabulary.cls_id, pad_id=vocabulary.pad_id, pad_value=-2)
        probabilities = head(encoder.cls(*batch)).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, runner.predict(query, strategy=name)["probabilities"], atol=2e-4)
    assert args["classes"] == runner.classes_.tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter", "adds adapters or prefixes, which the official layout has no place for"),
        ("prefix_tuning", "adds adapters or prefixes"),
        ("pca_logreg", "uses no encoder"),
        ("knn_frozen", "has no head that the official layout has a place for"),
    ],
)
def test_what_cannot_stand_alone(fitted, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fitted[0].save(tmp_path / "x", standalone=True, strategy=name)
    assert not (tmp_path / "x").exists()


def test_lora_config_is_an_alias(checkpoint):
    runner = sk.AnnotationRunner(checkpoint=checkpoint, strategies=("lora",), lora_config=LoRAConfig(rank=3))
    assert runner._strategies[0].config.rank == 3
    with pytest.raises(ValueError, match="give one of the two"):
        sk.AnnotationRunner(checkpoint=checkpoint, strategy_configs={}, lora_config=LoRAConfig())
    with pytest.raises(ValueError, match="strategy_configs has lora, not among the strategies"):
        sk.AnnotationRunner(checkpoint=checkpoint, lora_config=LoRAConfig())
