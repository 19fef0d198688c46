from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import scdlkit as sk
from scdlkit.foundation.embedding_cache import cached
from scdlkit.foundation.tokens import Tokens

CPU = torch.device("cpu")
KEPT = 1e-3  # a megabyte


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sk.settings, "_cache_dir", tmp_path)
    monkeypatch.setattr(sk.settings, "_cache_embeddings", KEPT)
    return tmp_path / "embeddings"


def cells(first: int = 1, n: int = 3) -> Tokens:
    ids = np.arange(first, first + n, dtype=np.int32)
    one = np.ones(n, np.uint8)
    return Tokens(np.arange(n + 1), ids, one, ids.astype(np.uint64), one.astype(np.int32))


class Encoder:
    """Counts how often it is asked."""

    def __init__(self, n: int = 3, embsize: int = 4) -> None:
        self.calls, self.embedding = 0, np.random.default_rng(n).standard_normal((n, embsize)).astype(np.float32)

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return self.embedding


def ask(encoder: Encoder, *draws: Tokens, checkpoint: str = "a", precision: str = "fp32") -> np.ndarray:
    return cached(encoder, draws or (cells(),), checkpoint_sha256=checkpoint, precision=precision, device=CPU)


def test_the_same_cells_are_computed_once(folder):
    encoder = Encoder()
    for _ in range(3):
        assert np.array_equal(ask(encoder), encoder.embedding)
    assert encoder.calls == 1
    assert [path.suffix for path in folder.iterdir()] == [".cached"]  # nothing unfinished


def test_whatever_it_depends_on_counts():
    encoder = Encoder()
    ask(encoder)
    ask(encoder, cells(2))
    ask(encoder, cells(), cells())
    ask(encoder, checkpoint="b")
    ask(encoder, precision="bf16")
    assert encoder.calls == 5


def test_off_by_default(folder, monkeypatch):
    assert sk._settings.Settings().cache_embeddings == 0
    monkeypatch.setattr(sk.settings, "_cache_embeddings", 0.0)
    encoder = Encoder()
    ask(encoder), ask(encoder)
    assert encoder.calls == 2 and not folder.exists()


@pytest.mark.parametrize("damage", [b"", b"x" * 10, "flip", "cut"])
def test_a_damaged_file_is_noticed_and_replaced(folder, damage, caplog):
    encoder = Encoder()
    ask(encoder)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "cut":
        content = content[:-8]
    else:
        content = damage
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "scdlkit"):
        assert np.array_equal(ask(encoder), encoder.embedding)
    assert "is damaged and is computed again" in caplog.text and encoder.calls == 2
    ask(encoder)
    assert encoder.calls == 2


def test_the_least_recently_used_go_first(folder):
    encoder = Encoder(3, 26_000)  # 312 kB
    for first in (1, 2, 3):
        ask(encoder, cells(first))
    for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (age, age))
    assert encoder.calls == 3
    ask(encoder, cells(1))  # used again
    ask(encoder, cells(4))  # one too many
    assert len(list(folder.iterdir())) == 3 and encoder.calls == 4
    ask(encoder, cells(1))
    assert encoder.calls == 4
    ask(encoder, cells(2))
    assert encoder.calls == 5


@pytest.mark.parametrize("error", [FileNotFoundError("removed by another process"), PermissionError("of another user")])
def test_a_file_whose_time_cannot_be_set_is_used(monkeypatch, error):
    encoder = Encoder()
    ask(encoder)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "utime", fail)
    assert np.array_equal(ask(encoder), encoder.embedding) and encoder.calls == 1


def test_processes_may_share_a_full_folder(folder):
    """Each finds, keeps and removes; none fails, and none gets what belongs to other cells."""
    script = (
        "import sys; sys.path.insert(0, {here!r})\n"
        "import scdlkit as sk; sk.settings.cache_dir = {cache!r}; sk.settings.cache_embeddings = {limit}\n"
        "from test_embedding_cache import Encoder, ask, cells, np\n"
        "for turn in range(60):\n"
        "    n = 3 + (turn * {step}) % 5\n"
        "    assert np.array_equal(ask(Encoder(n, 20_000), cells(n=n)), Encoder(n, 20_000).embedding)\n"
    )
    given = {"here": os.path.dirname(__file__), "cache": str(folder.parent), "limit": KEPT}
    commands = [[sys.executable, "-c", script.format(**given, step=step)] for step in (1, 2, 3)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate()[1] for process in running] == ["", "", ""]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= KEPT * 1e9


def test_what_others_are_writing_stays_and_what_they_left_goes(folder):
    folder.mkdir()
    being_written, left = folder / "one.unfinished", folder / "two.unfinished"
    for path in (being_written, left):
        path.write_bytes(bytes(2_000_000))  # more than the limit
    os.utime(left, (1, 1))
    ask(Encoder())
    assert being_written.exists() and not left.exists() and len(list(folder.glob("*.cached"))) == 1


def test_what_exceeds_the_limit_drives_nothing_out(folder, caplog):
    ask(Encoder())
    with caplog.at_level(logging.INFO, "scdlkit"):
        ask(Encoder(3, 100_000), cells(5))
    assert "more than settings.cache_embeddings allows" in caplog.text and len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_no_error(folder, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING, "scdlkit"):
        assert np.array_equal(ask(Encoder()), Encoder().embedding)
    assert "could not be kept" in caplog.text


def test_a_failure_leaves_nothing(folder):
    def fail() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(fail)
    assert not folder.exists()


def test_through_the_public_interface(blood, checkpoint, monkeypatch):
    first = sk.tl.embed(blood, checkpoint=checkpoint, copy=True).obsm["X_scgpt"]
    import scdlkit._reader

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(scdlkit._reader, "embed_tokens", fail)
    assert np.array_equal(sk.tl.embed(blood, checkpoint=checkpoint, copy=True).obsm["X_scgpt"], first)
    with pytest.raises(AssertionError, match="computed again"):
        sk.tl.embed(blood, checkpoint=checkpoint, random_state=1, copy=True)
    with pytest.raises(AssertionError, match="computed again"):
        sk.tl.embed(blood, checkpoint=checkpoint, precision="bf16", copy=True)
