"""Held against scGPT itself, where it can be imported; elsewhere its golden outputs stand in (tests/foundation)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import scdlkit as sk
from scdlkit.foundation.batching import collate
from scdlkit.foundation.tokens import tokenize
from scdlkit.foundation.weights import load_encoder, read_weights

upstream = pytest.importorskip("scgpt.model", exc_type=ImportError, reason="scGPT's own package is not importable")


def test_encoder_equals_upstream(blood, checkpoint):
    folder = checkpoint.parent / "torch_keys"
    args, vocab = (json.loads((folder / name).read_text()) for name in ("args.json", "vocab.json"))
    model = upstream.TransformerModel(
        ntoken=len(vocab), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"], n_cls=5, vocab=vocab, dropout=0.0, pad_token="<pad>", pad_value=-2,
        do_mvc=True, use_fast_transformer=False,
    )  # fmt: skip
    model.load_state_dict(read_weights(folder / "best_model.pt"), strict=False)
    model.eval()
    ids = np.array([vocab.get(name, -1) for name in blood.var_names])
    tokens = tokenize(blood.X[:32], ids)
    batch = collate(tokens, cls_id=vocab["<cls>"], pad_id=vocab["<pad>"], pad_value=-2)
    with torch.no_grad():
        theirs = model._encode(batch.gene_ids, batch.values, src_key_padding_mask=batch.padding_mask)[:, 0].numpy()
        ours = load_encoder(folder).cls(*batch).numpy()
    assert np.abs(ours - theirs).max() <= 1e-5


def test_a_saved_checkpoint_loads_in_upstream(tmp_path):
    """The embedded checkpoint, cast to float32, through upstream's own module, strictly."""
    found = sk.foundation.ensure_checkpoint("mini")
    args, vocab = found.args(), json.loads(found.vocab_path.read_text())
    model = upstream.TransformerModel(
        ntoken=len(vocab), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"], n_cls=1, vocab=vocab, dropout=0.0, pad_token="<pad>", pad_value=-2,
        do_mvc=True, use_fast_transformer=False,
    )  # fmt: skip
    state = {
        name.replace("self_attn.Wqkv.", "self_attn.in_proj_"): tensor.float()
        for name, tensor in read_weights(found.weights_path).items()
    }
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("cls_decoder.") for name in result.missing_keys)
