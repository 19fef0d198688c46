from __future__ import annotations

import threading

import numpy as np
import peft
import pytest
import torch
from torch import nn

from scdlkit.foundation._cell_attention import Scratch
from scdlkit.foundation.batching import collate
from scdlkit.foundation.frozen import FrozenEncoder, can_freeze
from scdlkit.foundation.inference import embed_tokens, normalise
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.strategies._peft import inject
from scdlkit.foundation.tokens import Tokens
from scdlkit.foundation.weights import load_encoder

CLS, PAD = 2, 0
WORST = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.02}  # of a component of the unit embedding


def cells_of(lengths: list[int], n_tokens: int) -> Tokens:
    rng = np.random.default_rng(0)
    ids = [rng.choice(np.arange(3, n_tokens), n, replace=False) for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    bins = rng.integers(1, 51, indptr[-1])
    n = np.asarray(lengths)
    return Tokens(indptr, np.concatenate(ids).astype(np.int32), bins.astype(np.uint8), n.astype(np.uint64), n)


def encoder_of(nlayers: int = 3, embsize: int = 48, nheads: int = 4, d_hid: int = 80) -> ScGPTEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(nlayers)
        encoder = ScGPTEncoder(ScGPTConfig(4000, embsize, nheads, d_hid, nlayers))
        for value in encoder.parameters():  # norms and biases that do something
            value.data += 0.1 * torch.randn_like(value)
    return encoder.eval()


def reference(encoder: ScGPTEncoder, tokens: Tokens) -> np.ndarray:
    """The ordinary encoder in float64, cell by cell."""
    exact = ScGPTEncoder(encoder.config).double().eval()
    exact.load_state_dict(encoder.state_dict())
    found = []
    with torch.inference_mode():
        for cell in range(tokens.n_cells):
            batch = collate(tokens, np.array([cell]), cls_id=CLS, pad_id=PAD, pad_value=encoder.config.pad_value)
            found.append(exact.cls(batch.gene_ids, batch.values.double())[0].numpy())
    return np.array(found)


# one head at a time over several blocks of queries; a cell of one gene; several heads at a time
LENGTHS = [1, 7, 2100, 300, 3, 1400]


@pytest.mark.parametrize("precision", WORST)
@pytest.mark.parametrize("shape", [(1, 48, 4, 80), (3, 48, 4, 80), (2, 40, 1, 16), (3, 128, 4, 80)], ids=str)
def test_equals_the_encoder(precision, shape):
    encoder, tokens = encoder_of(*shape), cells_of(LENGTHS, 4000)
    frozen = FrozenEncoder(encoder, precision)
    expected = reference(encoder, tokens)
    apart = np.abs(normalise(frozen(tokens, CLS, Scratch())) - normalise(expected)).max()
    assert apart <= WORST[precision]
    if shape[0] > 1 and precision != "fp32":
        assert apart > 1e-6  # it does compute in another precision


@pytest.mark.parametrize("precision", WORST)
@pytest.mark.parametrize("embsize", [48, 128])
def test_a_cell_does_not_depend_on_the_others(precision, embsize):
    encoder, tokens = encoder_of(embsize=embsize), cells_of(LENGTHS, 4000)
    frozen = FrozenEncoder(encoder, precision)
    scratch = Scratch()
    together = normalise(frozen(tokens, CLS, scratch))
    for rows in ([0], [4, 0], [5, 3, 1]):
        alone = normalise(frozen(tokens[np.array(rows)], CLS, scratch))
        # the products may sum in another order, after which bfloat16 and int8 may round differently
        np.testing.assert_allclose(alone, together[rows], atol={"fp32": 1e-6, "bf16": 3e-3, "int8": 6e-3}[precision])


def test_golden_embeddings(golden):
    encoder = load_encoder(golden.folder).eval()
    ids, values = golden.expected["synthetic_token_ids"], golden.expected["synthetic_token_values"]
    genes = (ids != golden.pad_id) & (ids != golden.cls_id)
    indptr = np.concatenate([[0], np.cumsum(genes.sum(axis=1))])
    n = np.diff(indptr)
    tokens = Tokens(indptr, ids[genes].astype(np.int32), values[genes].astype(np.uint8), n.astype(np.uint64), n)
    frozen = FrozenEncoder(encoder)
    assert np.abs(frozen(tokens, golden.cls_id, Scratch()) - golden.expected["synthetic_cls"]).max() <= 1e-5


def test_changed_encoders_are_not_frozen():
    assert can_freeze(encoder_of())
    adapted = encoder_of()
    inject(adapted, peft.LoraConfig(r=2, target_modules=["q", "v"]))
    prefixed = encoder_of()
    prefixed.blocks[1].prefix = nn.Identity()
    wrapped = encoder_of()
    wrapped.blocks[0].fc1 = nn.Sequential(wrapped.blocks[0].fc1)
    hooked = encoder_of()
    hooked.blocks[0].out.register_forward_hook(lambda *_: None)
    replaced = encoder_of()
    replaced.blocks[0].forward = lambda *_: None
    broken = encoder_of()
    broken.blocks[0].fc1.bias.data[0] = torch.nan
    for encoder in (adapted, prefixed, wrapped, hooked, replaced, broken, encoder_of().double()):
        assert not can_freeze(encoder)
    with pytest.raises(ValueError, match="changed by a strategy"):
        FrozenEncoder(adapted)


def test_embedding_goes_the_ordinary_way_where_something_was_put_in():
    plain, changed, tokens = encoder_of(), encoder_of(), cells_of([30, 40], 4000)
    inject(changed, peft.IA3Config(target_modules=["k", "v", "fc2"], feedforward_modules=["fc2"]))
    options = {"cls_id": CLS, "pad_id": PAD, "device": "cpu", "progress": False}
    for name, value in changed.named_parameters():
        if "ia3" in name:
            value.data.fill_(0.5)
    assert np.abs(embed_tokens(changed, tokens, **options) - embed_tokens(plain, tokens, **options)).max() > 1e-3
    with pytest.raises(ValueError, match="needs an unchanged encoder"):
        embed_tokens(changed, tokens, precision="int8", **options)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_threads_and_order(n_threads):
    encoder, tokens = encoder_of(), cells_of([0, 50, 700, 0, 30, 900, 800, 5] * 3, 4000)
    options = {"cls_id": CLS, "pad_id": PAD, "device": "cpu", "progress": False}
    expected = embed_tokens(encoder, tokens, batch_size=1, **options)
    before, running = torch.get_num_threads(), threading.active_count()
    try:
        torch.set_num_threads(n_threads)
        found = embed_tokens(encoder, tokens, max_batch_tokens=1000, **options)
        assert torch.get_num_threads() == n_threads and threading.active_count() == running
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found[tokens.lengths == 0] == 0).all()
