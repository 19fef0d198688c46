from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import row_file, stored_tokens
from scdlkit.foundation.batching import collate
from scdlkit.foundation.stored_tokens import StoredTokens, TokenArrays, TokenFiles, keep_in_memory, store_tokens
from scdlkit.foundation.strategies import CellData
from scdlkit.foundation.tokens import TokenizerConfig, Tokens, tokenize, tokenize_pieces

N_CELLS, N_GENES = 40, 30
FIELDS = ("indptr", "gene_ids", "bins", "cell_keys", "n_expressed")


def matrix(seed: int = 0) -> sp.csr_matrix:
    """Cells of 0 to many genes; the first, the last and two in a row have none."""
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.uniform(0, 1, (N_CELLS, 1)), (N_CELLS, N_GENES)).astype(np.float32)
    dense[[0, 7, 8, -1]] = 0
    return sp.csr_matrix(dense)


IDS = np.random.default_rng(1).permutation(N_GENES)
WHOLE = tokenize(matrix(), IDS, TokenizerConfig(max_length=12))


@pytest.fixture(scope="module", params=["files", "memory"])
def stored(request, tmp_path_factory) -> StoredTokens:
    return keep_in_memory(WHOLE) if request.param == "memory" else in_files(tmp_path_factory)


@pytest.fixture(scope="module")
def filed(tmp_path_factory) -> StoredTokens:
    return in_files(tmp_path_factory)


def in_files(tmp_path_factory: pytest.TempPathFactory) -> StoredTokens:
    cells = matrix()
    pieces = (cells[start : start + 7] for start in range(0, N_CELLS, 7))
    place = tmp_path_factory.mktemp("here") / "made"
    return store_tokens(tokenize_pieces(pieces, IDS, TokenizerConfig(max_length=12)), place)[0]


def assert_same(first: Tokens, second: Tokens) -> None:
    for name in FIELDS:
        one, two = getattr(first, name), getattr(second, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_are_the_tokens_in_memory(stored):
    assert_same(stored.load(), WHOLE)
    assert stored.n_cells == len(stored) == N_CELLS
    assert stored.fingerprint() == WHOLE.fingerprint()
    for name in ("indptr", "lengths", "cell_keys", "n_expressed"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(WHOLE, name))
    assert stored.genes().dtype == WHOLE.genes().dtype


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, N_CELLS - 1), max_size=60), piece=st.integers(1, 50), data=st.data())
def test_rows_in_any_order_and_repeated(stored, rows, piece, data):
    rows = np.array(rows, dtype=np.int64)
    some, expected = stored[rows], WHOLE[rows]
    assert_same(some.load(), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_tokens, "_PIECE", piece)
        assert some.fingerprint() == expected.fingerprint()
        np.testing.assert_array_equal(some.genes(), expected.genes())
    if len(rows):
        again = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20)), dtype=np.int64)
        assert_same(some[again].load(), expected[again])


@pytest.mark.parametrize("index", [slice(3, 30, 2), 5, WHOLE.lengths > 4, slice(0, 0)])
def test_other_indices(stored, index):
    assert_same(stored[index].load(), WHOLE[index])


def test_batches_are_the_same(stored):
    rows = np.array([5, 30, 2, 8])
    for some in (rows, None):
        one, two = (collate(x, some, cls_id=90, pad_id=91, pad_value=-2) for x in (stored, WHOLE))
        for first, second in zip(one, two, strict=True):
            assert first.equal(second)


def test_a_subset_reads_nothing(stored, monkeypatch):
    cells = CellData(tokens=stored, codes=np.arange(N_CELLS))
    for place in (TokenFiles, TokenArrays):
        monkeypatch.setattr(place, "read", lambda *_: pytest.fail("read"))
    some = cells.subset(np.arange(5, N_CELLS)[::-1]).subset(np.arange(30))
    np.testing.assert_array_equal(some.tokens.lengths, WHOLE.lengths[5:][::-1][:30])


def test_cells_that_follow_each_other_are_one_read(filed, monkeypatch):
    seen = []
    rows = filed._place.files["bins"]
    file = rows.file

    class Spy:
        fileno = file.fileno

        def seek(self, *at):
            seen.append(at)
            return file.seek(*at)

        def readinto(self, target):
            return file.readinto(target)

    monkeypatch.setattr(rows, "file", Spy())
    filed.load()
    filed[np.array([20, 10, 21, 11])].load()
    assert len(seen) == 3


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files have names there while they are open")
def test_nothing_is_left(tmp_path):
    tokens, size = store_tokens([WHOLE], tmp_path)
    assert size == 5 * len(WHOLE.bins)
    assert not list(tmp_path.iterdir())  # not even if the process is killed now
    descriptors = [file.file.fileno() for file in tokens._place.files.values()]
    part = tokens[:3]
    del tokens
    assert_same(part.load(), WHOLE[:3])  # the files live as long as a part of them
    del part
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


class Full:
    """A file on a disk that is full, or one that loses what is written without saying so."""

    def __init__(self, file, silent: bool) -> None:
        self.file, self.silent = file, silent

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.silent:
            return self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("silent", "reason"), [(False, "No space left on device"), (True, "bytes were written")])
def test_a_full_disk_is_explained(tmp_path, monkeypatch, silent, reason):
    open_file = row_file.tempfile.TemporaryFile
    monkeypatch.setattr(row_file.tempfile, "TemporaryFile", lambda **options: Full(open_file(**options), silent))
    with pytest.raises(OSError, match=f"cannot be written to .*{reason}.*free some space.*temp_dir"):
        store_tokens([WHOLE], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_none_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to '.*file'.*output_dir or scdlkit.settings.temp_dir"):
        store_tokens([WHOLE], tmp_path / "file")


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    tokens, _ = store_tokens([WHOLE], tmp_path)
    tokens._place.files["gene_ids"].file.truncate(40)
    with pytest.raises(OSError, match="was cut off"):
        tokens.load()


def test_no_cells(tmp_path):
    tokens, size = store_tokens([], Path(tmp_path))
    assert tokens.n_cells == size == 0
    assert_same(tokens.load(), Tokens.concatenate([]))
    assert len(tokens.genes()) == 0
