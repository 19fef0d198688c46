"""The contract that every strategy inside the encoder keeps, and strategies that break it on purpose."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scanpy as sc
import torch

from scdlkit.foundation.checkpoints import ensure_checkpoint
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.strategies import (
    AdapterConfig,
    BitFitConfig,
    CellData,
    FullFinetuneConfig,
    IA3Config,
    LoRAConfig,
    PrefixTuningConfig,
    TrainingConfig,
    get_strategy,
)
from scdlkit.foundation.strategies._encoder import EncoderStrategy
from scdlkit.foundation.strategies.bitfit import BitFit
from scdlkit.foundation.tokens import TokenizerConfig, tokenize
from scdlkit.foundation.training import Trainer
from scdlkit.foundation.vocabulary import Vocabulary
from scdlkit.foundation.weights import load_encoder

TRAINING = TrainingConfig(learning_rate=3e-3, batch_size=16, max_epochs=3)
CASES = {
    "lora": LoRAConfig(),
    "lora-all": LoRAConfig(target_modules=("q", "k", "v", "out", "fc1", "fc2"), rank=2, dropout=0.0),
    "dora": LoRAConfig(variant="dora"),
    "rslora": LoRAConfig(variant="rslora", layers="last:1"),
    "pissa": LoRAConfig(variant="pissa"),
    "ia3": IA3Config(),
    "adapter": AdapterConfig(bottleneck=4),
    "adapter-pfeiffer": AdapterConfig(bottleneck=4, variant="pfeiffer", dropout=0.1, layers="last:2"),
    "prefix_tuning": PrefixTuningConfig(length=3),
    "prefix_tuning-mlp": PrefixTuningConfig(length=3, reparametrise=True, hidden=8),
    "bitfit": BitFitConfig(),
    "full_finetune": FullFinetuneConfig(),
    "full_finetune-frozen-genes": FullFinetuneConfig(freeze_gene_embedding=True, layer_decay=1.0),
}
IDENTITY = {name for name in CASES if not name.startswith("prefix")}
every_case = pytest.mark.parametrize("case", sorted(CASES))
every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])
fresh_and_loaded = pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])


class Source:
    """The golden checkpoint as a strategy receives it."""

    def __init__(self, folder) -> None:
        self.checkpoint = ensure_checkpoint(folder)
        vocabulary = Vocabulary.from_json(self.checkpoint.vocab_path)
        self.vocabulary, self.cls_id, self.pad_id = vocabulary, vocabulary.cls_id, vocabulary.pad_id

    def encoder(self, token_ids):
        return load_encoder(self.checkpoint, token_ids=token_ids)

    def gene_rows(self, token_ids):
        encoder = self.encoder(token_ids)
        return encoder.gene_embedding.weight.detach()[encoder.row_of[torch.from_numpy(token_ids.astype(np.int64))]]


def data_of(folder, n: int, **tokens: int) -> SimpleNamespace:
    """Tokens, frozen embedding and codes of ``n`` real cells of each of 3 types, a third of them for validation."""
    source = Source(folder)
    cells = sc.datasets.pbmc68k_reduced()
    kinds = ["CD14+ Monocyte", "CD19+ B", "CD56+ NK"]
    rows = [np.flatnonzero(cells.obs["bulk_labels"] == kind)[:n] for kind in kinds]
    codes = np.repeat(np.arange(3), [len(part) for part in rows])
    ids = np.array([source.vocabulary.tokens.get(name, -1) for name in cells.raw.var_names])
    tokens = tokenize(cells.raw.X[np.concatenate(rows)], ids, TokenizerConfig(**tokens))
    embedding = embed_tokens(
        load_encoder(source.checkpoint),
        tokens,
        cls_id=source.cls_id,
        pad_id=source.pad_id,
        device="cpu",
        progress=False,
    )
    all_cells = CellData(embedding=embedding, tokens=tokens, codes=codes)
    is_val = np.arange(len(codes)) % 3 == 0
    return SimpleNamespace(
        source=source,
        all=all_cells,
        train=all_cells.subset(np.flatnonzero(~is_val)),
        val=all_cells.subset(np.flatnonzero(is_val)),
    )


@pytest.fixture(scope="module")
def data(checkpoint):
    return data_of(checkpoint, 20, max_length=80)  # of 250: a contract needs no more, and bfloat16 is slow on many CPUs


def make(case: str, data, **changes) -> EncoderStrategy:
    config = replace(CASES[case], **{"training": TRAINING, **changes})
    strategy = get_strategy(config.strategy)(config)
    strategy.source = data.source
    return strategy


def build(case: str, data) -> EncoderStrategy:
    strategy = make(case, data)
    strategy._rows = np.unique(data.all.tokens.gene_ids)
    strategy.build(data.train, n_classes=3, seed=0)
    return strategy


def build_and_load(case: str, data) -> EncoderStrategy:
    """What a saved strategy becomes when it is loaded."""
    built, again = build(case, data), make(case, data)
    built.n_classes = 3  # counts as fitted
    again.load_state(built.state_dict(), json.loads(json.dumps(built.metadata())))
    return again


def mixed(precision: str) -> AbstractContextManager:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")


def fit(case: str, data, seed: int = 0, **changes) -> EncoderStrategy:
    strategy = make(case, data, **changes)
    strategy.fit(data.train, data.val, n_classes=3, seed=seed, device="cpu", trainer=Trainer(progress=False))
    return strategy


@pytest.fixture(scope="module")
def fitted(data):
    """Each case, fitted once in each precision."""
    cache: dict[tuple[str, str], EncoderStrategy] = {}

    def get(case: str, precision: str = "fp32") -> EncoderStrategy:
        if (case, precision) not in cache:
            epochs = TRAINING.max_epochs if precision == "fp32" else 1  # slow where the CPU has no bfloat16
            cache[case, precision] = fit(case, data, training=replace(TRAINING, precision=precision, max_epochs=epochs))
        return cache[case, precision]

    return get


def without_dropout(strategy: EncoderStrategy) -> None:
    for module in strategy.trained_module().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


@fresh_and_loaded
@pytest.mark.parametrize("case", sorted(IDENTITY))
def test_starts_as_the_identity(case, data, loaded):
    strategy = (build_and_load if loaded else build)(case, data)
    np.testing.assert_allclose(strategy.latent(data.all), data.all.embedding, atol=2e-5)


@pytest.mark.parametrize("wanted", [False, True])
def test_attention_dropout_is_an_option(wanted, data):
    strategy = make("ia3", data, training=replace(TRAINING, attention_dropout=wanted))
    strategy._rows = np.unique(data.all.tokens.gene_ids)
    strategy.build(data.train, n_classes=3, seed=0)
    assert strategy.encoder.config.dropout > 0
    for block in strategy.encoder.blocks:
        assert (block.attention_dropout > 0) == wanted
        assert block.dropout.p == strategy.encoder.config.dropout  # the other dropout stays


@every_precision
@fresh_and_loaded
@every_case
def test_every_trainable_tensor_gets_a_gradient(case, data, loaded, precision):
    strategy = (build_and_load if loaded else build)(case, data)
    without_dropout(strategy)
    module = strategy.trained_module().train()
    with torch.no_grad():  # zero-initialised factors give their partners no gradient at the very start
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with mixed(precision):
        logits = strategy.logits(data.all)
    torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(data.all.codes)).backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
            assert 1e-6 < parameter.grad.norm() < np.inf, name  # rounding alone gives 1e-8
        else:
            assert parameter.grad is None, name


@every_precision
@fresh_and_loaded
@every_case
def test_train_mode_without_dropout_equals_eval(case, data, loaded, precision):
    strategy = (build_and_load if loaded else build)(case, data)
    without_dropout(strategy)
    module = strategy.trained_module()
    with torch.no_grad(), mixed(precision):
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        module.train()
        train = strategy.logits(data.val).float()
        module.eval()
        evaluated = strategy.logits(data.val).float()
        strategy.encoder.training = True  # alone: what goes from block to block is rounded as in train mode
        rounded = strategy.logits(data.val).float()
        strategy.encoder.training = False
    if case == "dora" and precision == "bf16":
        # peft adds up in another order in train mode, each sum rounded to 8 bits
        assert (train - rounded).norm() < 0.1 * rounded.norm()
    else:
        np.testing.assert_allclose(train, rounded, atol=1e-5)
    assert np.abs(strategy.latent(data.val) - data.val.embedding).max() > 1e-3  # and it acts in eval mode
    with torch.no_grad():
        exact = strategy.logits(data.val)
    assert (exact - evaluated).norm() < (0.1 if precision == "bf16" else 1e-5) * exact.norm()


@every_precision
@every_case
def test_training_moves_what_trains_and_nothing_else(case, data, fitted, precision):
    strategy, before = fitted(case, precision), build(case, data).trained_module()
    moved = {
        name
        for (name, old), (_, new) in zip(
            before.named_parameters(), strategy.trained_module().named_parameters(), strict=True
        )
        if not torch.equal(old, new)
    }
    trainable = {name for name, value in before.named_parameters() if value.requires_grad}
    assert moved <= trainable and len(moved) >= 0.9 * len(trainable)
    assert strategy.n_trainable == sum(v.numel() for v in before.parameters() if v.requires_grad)
    assert np.abs(strategy.latent(data.val) - data.val.embedding).max() > 1e-4
    if precision == "bf16":
        assert strategy.history != fitted(case).history  # it was used
        # the rounding of each step moves the next ones: an epoch's mean loss of full fine-tuning was 4 % off
        np.testing.assert_allclose(strategy.history[0]["train_loss"], fitted(case).history[0]["train_loss"], rtol=0.1)


@every_precision
@every_case
def test_saved_and_loaded_is_the_same(case, data, fitted, precision):
    strategy = fitted(case, precision)
    state, metadata = strategy.state_dict(), strategy.metadata()
    assert not any(value.dtype in (torch.bfloat16, torch.float16) for value in state.values())
    again = make(case, data)
    again.load_state(state, metadata)
    np.testing.assert_allclose(again.predict_proba(data.val), strategy.predict_proba(data.val), atol=1e-5)
    np.testing.assert_allclose(again.latent(data.all), strategy.latent(data.all), atol=1e-5)
    second = again.state_dict()
    assert second.keys() == state.keys() and all(torch.equal(second[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="does not fit: .*head.out.weight is missing"):
        make(case, data).load_state({n: t for n, t in state.items() if n != "head.out.weight"}, metadata)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"full_finetune", "full_finetune-frozen-genes"}))
def test_only_the_delta_is_saved(case, fitted):
    strategy = fitted(case)
    encoder = {n: t for n, t in strategy.state_dict().items() if n.startswith("encoder.")}
    assert not any(name.endswith(("gene_embedding.weight", "base_layer.weight")) for name in encoder)
    total = sum(t.numel() for t in strategy.encoder.state_dict().values())
    assert 0 < sum(t.numel() for t in encoder.values()) < 0.35 * total


def test_full_finetune_saves_changed_rows_alone(data, fitted):
    state = fitted("full_finetune").state_dict()
    used = np.unique(data.train.tokens.gene_ids)
    assert set(state["gene_rows/ids"].tolist()) == {*used.tolist(), data.source.cls_id}
    assert "encoder.gene_embedding.weight" not in state
    assert "gene_rows/ids" not in fitted("full_finetune-frozen-genes").state_dict()
    base = data.source.encoder(used).state_dict()
    same = {
        n for n, t in state.items() if n.startswith("encoder.") and torch.equal(t, base[n.removeprefix("encoder.")])
    }
    assert not same
    left = {n for n in base if f"encoder.{n}" not in state} - {"gene_embedding.weight"}
    assert left == {f"blocks.{i}.k.bias" for i in range(3)}


def test_full_finetune_loads_changed_rows_beside_pretrained_ones(data, fitted):
    strategy = fitted("full_finetune")
    used = np.unique(data.train.tokens.gene_ids)
    unseen = np.setdiff1d(np.arange(100), [*used, data.source.cls_id, data.source.pad_id])
    assert len(unseen) > 5
    again = make("full_finetune", data)
    again.load_state(strategy.state_dict(), strategy.metadata())
    again.cover(unseen)
    encoder, fitted_encoder = again.encoder, strategy.encoder

    def rows(of, ids):
        return of.gene_embedding.weight.detach()[of.row_of[torch.from_numpy(ids)]]

    assert torch.equal(rows(encoder, used), rows(fitted_encoder, used))
    assert not torch.equal(rows(encoder, used), data.source.gene_rows(used))
    assert torch.equal(rows(encoder, unseen), data.source.gene_rows(unseen))


@pytest.mark.parametrize("case", ["lora", "ia3", "adapter", "prefix_tuning", "bitfit", "full_finetune"])
def test_learns_on_a_pretrained_encoder(case):
    """Three blood cell types from 40 cells of each, on the embedded checkpoint: nearly all held-out cells are right."""
    mini = data_of("mini", 40)
    defaults = get_strategy(case)().config.training
    strategy = make(case, mini, training=replace(defaults, max_epochs=8 if case == "full_finetune" else 4))
    strategy.fit(mini.train, mini.val, n_classes=3, seed=0, device="cpu", trainer=Trainer(progress=False))
    assert (strategy.predict_proba(mini.val).argmax(1) == mini.val.codes).mean() > 0.9
    assert strategy.history[-1]["train_loss"] < strategy.history[0]["train_loss"]


def test_same_seed_same_weights_and_the_global_generator_is_left_alone(data):
    before = torch.random.get_rng_state()
    first, second = fit("lora", data, seed=3), fit("lora", data, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = fit("lora", data, seed=4).state_dict()
    assert any(not torch.equal(states[0][name], other[name]) for name in other)


@pytest.mark.parametrize("case", ["lora-all", "dora", "rslora", "ia3"])
def test_merged_by_peft_equals_unmerged(case, data, fitted):
    strategy = make(case, data)
    strategy.load_state(fitted(case).state_dict(), fitted(case).metadata())
    unmerged = strategy.probabilities(data.val, 3)
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in strategy.encoder.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    for layer in layers:
        layer.merge()
    np.testing.assert_allclose(strategy.probabilities(data.val, 3), unmerged, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_those_of_the_module_that_was_trained(case, data, fitted, monkeypatch):
    """What is merged, packed and run once gives the numbers of the module as it is."""
    strategy = make(case, data)
    strategy.load_state(fitted(case).state_dict(), fitted(case).metadata())
    runs = []
    encoder_class = type(strategy.encoder)
    forward = encoder_class.cls
    monkeypatch.setattr(encoder_class, "cls", lambda *args, **kw: runs.append(1) or forward(*args, **kw))
    probabilities, latent = strategy.outputs(data.val)
    assert bool(runs) == case.startswith(("adapter", "prefix"))  # all others run as a plain encoder
    np.testing.assert_allclose(probabilities, strategy.probabilities(data.val, 3), atol=1e-5)
    expected = strategy._run(data.val, lambda part: strategy.encoder.cls(*strategy._batch(part)), latent.shape[1])
    np.testing.assert_allclose(latent, expected, atol=1e-5)
    np.testing.assert_array_equal(strategy.predict_proba(data.val), probabilities)
    np.testing.assert_array_equal(strategy.latent(data.val), latent)


@pytest.mark.parametrize("case", ["lora-all", "full_finetune", "adapter", "prefix_tuning"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_predictions_in_another_precision(case, precision, data, fitted, monkeypatch, caplog):
    strategy = fitted(case)
    exact = strategy.latent(data.val)
    monkeypatch.setattr(strategy, "precision", precision)
    monkeypatch.setattr(strategy, "_int8_refused", False)
    latent = strategy.latent(data.val)
    strategy.latent(data.val)  # says nothing again
    refused = precision == "int8" and case in ("adapter", "prefix_tuning")
    assert caplog.text.count("cannot be folded into int8 layers; its encoder runs in bf16") == refused
    assert not np.array_equal(latent, exact)
    np.testing.assert_allclose(latent, exact, atol=0.1)


def test_prefix_equals_attention_over_concatenated_keys(data):
    """Brute force: softmax over the prefix's keys and the cell's own, in float64."""
    strategy = build("prefix_tuning", data)
    block = strategy.encoder.blocks[0].double().eval()
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[1, ..., 5:] = False
    prefix = block.prefix.key_values.double()  # [2, length, width]
    keys = torch.cat([prefix[0].expand(2, -1, -1), block.k(x)], dim=1)
    values = torch.cat([prefix[1].expand(2, -1, -1), block.v(x)], dim=1)
    open_ = torch.cat([torch.ones(2, 3, dtype=torch.bool), keep[:, 0, 0]], dim=1)
    attended = torch.empty_like(x)
    for cell in range(2):
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = block.q(x)[cell, :, part] @ keys[cell, :, part].T / np.sqrt(8)
            scores[:, ~open_[cell]] = -torch.inf
            attended[cell, :, part] = scores.softmax(-1) @ values[cell, :, part]
    hidden = block.norm1(x + block.out(attended))
    expected = block.norm2(hidden + block.fc2(torch.relu(block.fc1(hidden))))
    torch.testing.assert_close(block(x, keep), expected)
    torch.testing.assert_close(block(x, keep, cls_only=True), expected[:, :1])


def test_layers_and_learning_rates(data):
    strategy = build("adapter-pfeiffer", data)
    names = {name.split(".")[2] for name, v in strategy.trained_module().named_parameters() if "up" in name}
    assert names == {"1", "2"}
    full = build("full_finetune", data)
    assert full.learning_rate_scale("encoder.blocks.2.q.weight") == 1
    assert full.learning_rate_scale("head.out.weight") == full.config.head_learning_rate / TRAINING.learning_rate
    same = make("full_finetune", data, head_learning_rate=None)
    assert same.learning_rate_scale("head.out.weight") == 1
    assert full.learning_rate_scale("encoder.blocks.0.q.weight") == pytest.approx(0.81)
    assert full.learning_rate_scale("encoder.gene_embedding.weight") == pytest.approx(0.729)
    with pytest.raises(ValueError, match="layers='last:9', but the encoder has 3 blocks"):
        strategy = make("lora", data, layers="last:9")
        strategy.fit(data.train, data.val, n_classes=3, trainer=Trainer(progress=False))


def test_a_query_may_bring_new_genes(data, fitted):
    strategy = make("lora", data)
    strategy.load_state(fitted("lora").state_dict(), fitted("lora").metadata())  # holds <cls> and <pad> alone
    assert len(strategy.encoder.token_ids) == 2
    first = strategy.predict_proba(data.val.subset(np.arange(3)))
    np.testing.assert_allclose(strategy.predict_proba(data.val)[:3], first, atol=1e-5)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: LoRAConfig(rank=0), "rank must be an integer at least 1"),
        (lambda: LoRAConfig(target_modules=("q", "w")), "target_modules must be different layers of q, k, v"),
        (lambda: LoRAConfig(target_modules=()), "found none"),
        (lambda: LoRAConfig(variant="qlora"), "variant must be one of"),
        (lambda: LoRAConfig(layers="first:2"), "layers must be None or 'last:k'"),
        (lambda: IA3Config(layers="last:0"), "layers must be None or 'last:k'"),
        (lambda: AdapterConfig(bottleneck=0), "bottleneck must be an integer"),
        (lambda: PrefixTuningConfig(length=-1), "length must be an integer"),
        (lambda: FullFinetuneConfig(layer_decay=1.5), "layer_decay must be a number"),
        (lambda: FullFinetuneConfig(head_learning_rate=0.0), "head_learning_rate must be a number above 0, or None"),
        (lambda: BitFitConfig(head_layers=0), "head_layers must be an integer"),
    ],
)
def test_bad_configs(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


@every_case
def test_configs_survive_a_manifest(case):
    config = CASES[case]
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=f"takes a .*, found .*, which belongs to strategy '{config.strategy}'"):
        get_strategy("head")(config)


class Forgetful(BitFit):
    """Broken on purpose: thaws a bias that softmax ignores."""

    name = "forgetful"

    def adapt(self, encoder):
        super().adapt(encoder)
        encoder.blocks[0].k.bias.requires_grad = True


class Vanishing(BitFit):
    """Broken on purpose: acts in train mode alone, as an adapter under a fused inference path would."""

    name = "vanishing"

    def adapt(self, encoder):
        super().adapt(encoder)
        block = encoder.blocks[-1]
        original = block.forward
        block.forward = lambda *args, **kwargs: original(*args, **kwargs) + (0.1 if block.training else 0.0)


def test_the_contract_can_fail(data, monkeypatch):
    import scdlkit.foundation.strategies._registry as registry

    for broken, check in (
        (Forgetful, test_every_trainable_tensor_gets_a_gradient),
        (Vanishing, test_train_mode_without_dropout_equals_eval),
    ):
        monkeypatch.setitem(registry._REGISTRY, "bitfit", broken)
        with pytest.raises(AssertionError):
            check("bitfit", data, loaded=False, precision="fp32")
