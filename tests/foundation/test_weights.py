from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from scdlkit.foundation.model import ScGPTConfig
from scdlkit.foundation.weights import (
    QKV_SPELLINGS,
    detect_spelling,
    load_encoder,
    read_weights,
    save_checkpoint,
    to_engine,
    to_official,
)


@pytest.fixture
def official(golden):
    return read_weights(golden.folder / "best_model.pt")


@pytest.fixture
def config(golden):
    return ScGPTConfig.from_args(golden.args, n_tokens=max(golden.vocab.values()) + 1)


@pytest.mark.parametrize("spelling", QKV_SPELLINGS)
def test_round_trip_is_bit_equal(official, config, spelling):
    state, heads = to_engine(official, config)
    respelled = {**to_official(state, spelling=spelling), **heads}
    assert detect_spelling(respelled) == spelling
    again, heads = to_engine(respelled, config)
    back = {**to_official(again, spelling=detect_spelling(official)), **heads}
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


def test_saved_checkpoint_equals_the_original(golden, official, config, tmp_path):
    state, heads = to_engine(official, config)
    folder = save_checkpoint(
        tmp_path / "copy",
        load_encoder(golden.folder).state_dict(),
        args=golden.args,
        vocab=golden.vocab,
        heads=heads,
        spelling=detect_spelling(official),
    )
    assert sorted(path.name for path in folder.iterdir()) == ["args.json", "best_model.pt", "vocab.json"]
    saved = read_weights(folder / "best_model.pt")
    assert saved.keys() == official.keys() and all(torch.equal(saved[n], official[n]) for n in official)
    assert json.loads((folder / "vocab.json").read_text()) == golden.vocab
    with pytest.raises(ValueError, match="is not empty"):
        save_checkpoint(folder, state, args=golden.args, vocab=golden.vocab)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]  # nothing half-written beside it


def test_data_parallel_prefix(official, tmp_path):
    torch.save({f"module.{name}": tensor for name, tensor in official.items()}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt").keys() == official.keys()


def test_half_precision_is_cast_exactly(golden, tmp_path):
    half = {name: tensor.half() for name, tensor in load_encoder(golden.folder).state_dict().items()}
    save_checkpoint(tmp_path / "half", half, args=golden.args, vocab=golden.vocab)
    loaded = load_encoder(tmp_path / "half").state_dict()
    assert all(t.dtype == torch.float32 and torch.equal(t, half[name].float()) for name, t in loaded.items())


def test_every_misfit_is_listed(official, config):
    del official["transformer_encoder.layers.1.norm2.bias"]
    official["value_encoder.linear2.weight"] = torch.zeros(32, 31)
    official["surprise.weight"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        to_engine(official, config)
    message = str(error.value)
    assert "missing: transformer_encoder.layers.1.norm2.bias (32,)" in message
    assert "shape: value_encoder.linear2.weight is (32, 31), expected (32, 32)" in message
    assert "unknown: surprise.weight (3,)" in message


def test_vocabulary_of_another_size(golden, official, config, tmp_path):
    shutil.copytree(golden.folder, tmp_path / "w", ignore=shutil.ignore_patterns("expected.npz"))
    vocab = {**golden.vocab, "NEW": max(golden.vocab.values()) + 1}
    (tmp_path / "w" / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="shape: encoder.embedding.weight is .*expected"):
        load_encoder(tmp_path / "w")


def test_heads_are_reported_at_debug_level(official, config, caplog):
    with caplog.at_level(logging.DEBUG, logger="scdlkit"):
        _, heads = to_engine(official, config)
    assert "decoder.fc.0.weight" in heads and "decoder.fc.0.weight" in caplog.text


def test_unreadable_files(golden, tmp_path):
    whole = (golden.folder / "best_model.pt").read_bytes()
    for name, content in {"truncated": whole[: len(whole) // 2], "text": b"not a checkpoint", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="corrupt, truncated or holds more than tensors"):
            read_weights(tmp_path / name)


def test_foreign_checkpoint(golden, tmp_path):
    shutil.copytree(golden.folder, tmp_path / "w", ignore=shutil.ignore_patterns("expected.npz"))
    (tmp_path / "w" / "args.json").write_text('{"model_type": "bert", "hidden_size": 256}')
    with pytest.raises(ValueError, match="lacks embsize, nheads, d_hid, nlayers: this is not an scGPT checkpoint"):
        load_encoder(tmp_path / "w")


def test_weights_that_are_not_finite(golden, official, tmp_path):
    shutil.copytree(golden.folder, tmp_path / "w", ignore=shutil.ignore_patterns("expected.npz"))
    official["transformer_encoder.layers.1.norm2.weight"][3] = float("nan")
    torch.save(official, tmp_path / "w" / "best_model.pt")
    with pytest.raises(ValueError, match=r"NaN or infinite weights: blocks\.1\.norm2\.weight"):
        load_encoder(tmp_path / "w")


def test_code_in_a_file_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"encoder.embedding.weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_weights(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds list, not a flat dictionary"):
        read_weights(tmp_path / "list.pt")


def test_loading_leaves_the_global_generator_alone(golden):
    before = torch.random.get_rng_state()
    encoder = load_encoder(golden.folder, token_ids=np.array([-1, 5, 3]))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(encoder.token_ids) == {3, 5, golden.cls_id, golden.pad_id} and not encoder.training
    with pytest.raises(ValueError, match="spelling must be one of"):
        to_official(encoder.state_dict(), spelling="qkv")
