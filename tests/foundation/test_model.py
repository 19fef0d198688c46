from __future__ import annotations

import numpy as np
import pytest
import torch

from scdlkit.foundation.model import AnnotationHead, ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.weights import load_encoder, read_weights


def upstream_batch(golden, cells):
    ids = torch.from_numpy(golden.expected[f"{cells}_token_ids"]).long()
    values = torch.from_numpy(golden.expected[f"{cells}_token_values"]).float()
    return ids, values, ids == golden.pad_id


@pytest.mark.parametrize("cells", ["real", "synthetic"])
@pytest.mark.parametrize("compact", [False, True])
def test_parity_with_upstream(golden, cells, compact):
    ids, values, mask = upstream_batch(golden, cells)
    encoder = load_encoder(golden.folder, token_ids=np.unique(ids.numpy()) if compact else None)
    expected = golden.expected[f"{cells}_cls"]
    with torch.inference_mode():
        full = encoder(ids, values, mask)[:, 0].numpy()
        cls_only = encoder.cls(ids, values, mask).numpy()
        tables = encoder.cls(ids, values, mask, tables=encoder.input_tables()).numpy()
    for output in (full, cls_only, tables):
        assert np.abs(output - expected).max() <= 1e-5
    if compact:
        assert len(encoder.token_ids) < encoder.config.n_tokens
        with torch.inference_mode():
            np.testing.assert_array_equal(load_encoder(golden.folder)(ids, values, mask)[:, 0].numpy(), full)


def test_annotation_head_parity(golden):
    if golden.name != "torch_keys":
        assert "real_logits" not in golden.expected
        return
    state = {
        name.replace("cls_decoder._decoder.", "hidden.").replace("cls_decoder.out_layer.", "out."): tensor
        for name, tensor in read_weights(golden.folder / "best_model.pt").items()
        if name.startswith("cls_decoder.")
    }
    head = AnnotationHead(32, 5)
    head.load_state_dict(state, strict=True)
    for cells in ("real", "synthetic"):
        with torch.inference_mode():
            logits = head(torch.from_numpy(golden.expected[f"{cells}_cls"])).numpy()
        assert np.abs(logits - golden.expected[f"{cells}_logits"]).max() <= 1e-5


def test_train_mode_without_dropout_equals_eval(golden):
    encoder = load_encoder(golden.folder)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in encoder.blocks:
        block.attention_dropout = 0.0
    batch = upstream_batch(golden, "real")
    with torch.no_grad():
        np.testing.assert_allclose(encoder.train().cls(*batch), encoder.eval().cls(*batch), atol=1e-6)


def test_every_parameter_gets_a_gradient(golden):
    encoder = load_encoder(golden.folder).train()
    encoder.cls(*upstream_batch(golden, "real")).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        # a bias added to every key shifts all attention scores alike: its gradient is zero by construction
        if not name.endswith(".k.bias"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_values_looked_up_are_values_embedded(golden):
    encoder = load_encoder(golden.folder).double().train()
    encoder.value_encoder.dropout.p = 0.0
    values, scale = upstream_batch(golden, "real")[1].double(), encoder._scale()
    found = []
    for embedded in (encoder.value_encoder(values), encoder.value_encoder.look_up(values, scale)):
        encoder.zero_grad()
        embedded.sin().sum().backward()
        found.append([embedded, *(parameter.grad for parameter in encoder.value_encoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_changes_nothing(golden):
    ids, values, mask = upstream_batch(golden, "synthetic")
    encoder = load_encoder(golden.folder)
    with torch.inference_mode():
        padded = encoder.cls(ids, values, mask)
        for i in (0, 7, 23):
            length = int((~mask[i]).sum())
            alone = encoder.cls(ids[i : i + 1, :length], values[i : i + 1, :length])
            np.testing.assert_allclose(alone[0], padded[i], atol=1e-5)


def test_config(golden):
    config = ScGPTConfig.from_args(golden.args, n_tokens=10)
    assert (config.embsize, config.nheads, config.d_hid, config.nlayers) == (32, 4, 48, 3)
    assert (config.max_length, config.pad_value, config.n_bins) == (1200, -2, 51)
    with pytest.raises(ValueError, match="args.json lacks d_hid, nlayers"):
        ScGPTConfig.from_args({"embsize": 8, "nheads": 2}, n_tokens=10)
    with pytest.raises(ValueError, match="input_emb_style='category'"):
        ScGPTConfig.from_args({**golden.args, "input_emb_style": "category"}, n_tokens=10)
    with pytest.raises(ValueError, match="multiple of nheads"):
        ScGPTConfig(n_tokens=10, embsize=10, nheads=4, d_hid=8, nlayers=1)
    with pytest.raises(ValueError, match="nlayers must be a positive integer, found 0"):
        ScGPTConfig(n_tokens=10, embsize=8, nheads=4, d_hid=8, nlayers=0)
    for change, message in (
        ({"dropout": "0.2"}, "dropout must be in"),
        ({"n_bins": "51"}, "n_bins must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            ScGPTConfig.from_args({**golden.args, **change}, n_tokens=10)


def test_missing_rows_are_an_error():
    encoder = ScGPTEncoder(ScGPTConfig(n_tokens=10, embsize=8, nheads=2, d_hid=8, nlayers=1), np.array([1, 4, 9]))
    encoder.check_token_ids(np.array([4, 9]))
    with pytest.raises(KeyError, match="2 gene tokens \\(first id 2\\) are not in this encoder, which holds 3 of 10"):
        encoder.check_token_ids(np.array([2, 3, 4]))
    with pytest.raises(ValueError, match="sorted, unique"):
        ScGPTEncoder(encoder.config, np.array([4, 1]))
