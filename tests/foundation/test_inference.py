from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation._device import embedding_precision, resolve_device
from scdlkit.foundation.batching import collate, length_batches, packs
from scdlkit.foundation.inference import embed_tokens, normalise
from scdlkit.foundation.tokens import Tokens, tokenize
from scdlkit.foundation.weights import load_encoder


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=60).map(np.array),
    max_tokens=st.integers(1, 1000),
    max_cells=st.none() | st.integers(1, 20),
)
def test_batches_hold_every_cell_once_within_the_budget(lengths, max_tokens, max_cells):
    lengths = lengths.astype(int)
    batches = length_batches(lengths, max_tokens=max_tokens, max_cells=max_cells)
    assert sorted(np.concatenate([np.empty(0, int), *batches])) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * (lengths[rows].max() + 1) <= max_tokens
        assert max_cells is None or len(rows) <= max_cells
    with pytest.raises(ValueError, match="at least 1"):
        length_batches(lengths, max_tokens=0)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=60).map(np.array),
    max_tokens=st.integers(1, 1000),
    max_cells=st.none() | st.integers(1, 20),
)
def test_packs_hold_consecutive_cells_within_the_budget(lengths, max_tokens, max_cells):
    lengths = lengths.astype(int)
    found = packs(lengths, max_tokens=max_tokens, max_cells=max_cells)
    assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(len(lengths)))
    for rows in found:
        assert len(rows) == 1 or (lengths[rows] + 1).sum() <= max_tokens
        assert max_cells is None or len(rows) <= max_cells
    with pytest.raises(ValueError, match="at least 1"):
        packs(lengths, max_tokens=10, max_cells=0)


def test_precision():
    cpu = resolve_device("cpu")
    assert [embedding_precision(name, cpu) for name in ("auto", "fp32", "bf16", "int8", None)] == [
        "fp32", "fp32", "bf16", "int8", "fp32",
    ]  # fmt: skip
    for wrong in ("fp16", "fp8"):
        with pytest.raises(ValueError, match="precision"):
            embedding_precision(wrong, cpu)


def test_collate():
    tokens = tokenize(sp.csr_matrix(np.array([[1, 0, 3], [0, 2, 0], [0, 0, 0]], np.float32)), np.array([5, 6, 7]))
    batch = collate(tokens, cls_id=1, pad_id=0, pad_value=-2)
    assert batch.gene_ids.tolist() == [[1, 5, 7], [1, 6, 0], [1, 0, 0]]
    assert batch.values[0].tolist() == [-2, *tokens.bins[:2].tolist()] and batch.values[2].tolist() == [-2, -2, -2]
    assert batch.padding_mask.tolist() == [[False] * 3, [False, False, True], [False, True, True]]
    assert collate(tokens[:1], cls_id=1, pad_id=0, pad_value=-2).padding_mask is None
    longer = collate(tokens, cls_id=1, pad_id=0, pad_value=-2, multiple=4)
    for part, whole, rest in zip(longer, batch, (0, -2, True), strict=True):
        assert whole.shape == (3, 3) and part.shape == (3, 4)
        assert torch.equal(part[:, :3], whole) and (part[:, 3] == rest).all()
    alike = collate(tokens, np.array([0, 0]), cls_id=1, pad_id=0, pad_value=-2, multiple=4)
    assert alike.gene_ids.shape == (2, 3) and alike.padding_mask is None


def test_cells_of_one_length_need_no_mask_and_give_the_same(fits, monkeypatch):
    """Only without a mask can a GPU take flash attention."""
    source = fits.Source(dropout=0.0)
    encoder, cells = source.encoder().eval(), fits.cells(80, source)
    special = {"cls_id": source.cls_id, "pad_id": source.pad_id, "pad_value": -2}
    alike = np.flatnonzero(cells.tokens.lengths == np.bincount(cells.tokens.lengths).argmax())
    masks, attention = [], F.scaled_dot_product_attention

    def spied(*args, attn_mask, **options):
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    with torch.inference_mode():
        batch = collate(cells.tokens, alike, **special)
        without = encoder.cls(*batch)
        assert batch.padding_mask is None and len(alike) > 1 and masks == [None, None]
        masked = encoder.cls(batch.gene_ids, batch.values, torch.zeros(batch.gene_ids.shape, dtype=torch.bool))
        among_longer = encoder.cls(*collate(cells.tokens, **special))[alike]
    assert len(masks) == 6 and all(mask is not None for mask in masks[2:])
    np.testing.assert_allclose(without, masked, atol=1e-5)
    np.testing.assert_allclose(without, among_longer, atol=1e-5)


@pytest.fixture
def upstream_tokens(golden):
    """Upstream's own tokens of the synthetic cells."""
    ids, values = golden.expected["synthetic_token_ids"], golden.expected["synthetic_token_values"]
    genes = (ids != golden.pad_id) & (ids != golden.cls_id)
    indptr = np.concatenate([[0], np.cumsum(genes.sum(axis=1))])
    n = np.diff(indptr)
    return Tokens(indptr, ids[genes].astype(np.int32), values[genes].astype(np.uint8), n.astype(np.uint64), n)


def test_embedding_equals_upstream_in_the_callers_order(golden, upstream_tokens):
    encoder = load_encoder(golden.folder)
    special = {"cls_id": golden.cls_id, "pad_id": golden.pad_id, "device": "cpu"}
    expected = golden.expected["synthetic_cls"]
    order = np.random.default_rng(0).permutation(24)
    for options in ({}, {"batch_size": 1}, {"max_batch_tokens": 700}):
        ours = embed_tokens(encoder, upstream_tokens[order], **special, **options)
        assert ours.dtype == np.float32 and np.abs(ours - expected[order]).max() <= 1e-5
    np.testing.assert_allclose(
        normalise(embed_tokens(encoder, upstream_tokens, **special)),
        golden.expected["synthetic_cls_normalised"],
        atol=1e-5,
    )


def test_cells_without_genes_are_zero(golden):
    tokens = tokenize(sp.csr_matrix(np.array([[0, 0], [1, 2]], np.float32)), np.array([3, 4]))
    encoder = load_encoder(golden.folder)
    ours = embed_tokens(encoder, tokens, cls_id=golden.cls_id, pad_id=golden.pad_id, device="cpu")
    assert (ours[0] == 0).all() and np.abs(ours[1]).sum() > 0
    assert (normalise(ours)[0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(normalise(ours)[1]), 1, rtol=1e-6)


def test_genes_outside_a_compact_encoder(golden, upstream_tokens):
    encoder = load_encoder(golden.folder, token_ids=upstream_tokens.gene_ids[:10])
    with pytest.raises(KeyError, match="are not in this encoder"):
        embed_tokens(encoder, upstream_tokens, cls_id=golden.cls_id, pad_id=golden.pad_id, device="cpu")


def test_device():
    assert resolve_device("cpu").type == "cpu" and resolve_device("auto").type in {"cpu", "cuda"}
    with pytest.raises(ValueError, match="device must be 'auto'"):
        resolve_device("quantum")
    with pytest.raises(ValueError, match="PyTorch sees"):
        resolve_device("cuda:99")
