from __future__ import annotations

import numpy as np
import pytest

from scdlkit.foundation import expression_rows
from scdlkit.foundation.checkpoints import ensure_checkpoint
from scdlkit.foundation.expression import choose_expression
from scdlkit.foundation.expression_rows import ExpressionRows
from scdlkit.foundation.vocabulary import Vocabulary


@pytest.fixture
def choose(checkpoint, monkeypatch):
    monkeypatch.setattr(expression_rows, "CHUNK_CELLS", 16)
    vocabulary = Vocabulary.from_json(ensure_checkpoint(checkpoint).vocab_path)
    return lambda adata: choose_expression(adata, vocabulary)


def test_every_row_comes_once_in_the_order_of_the_matrix(blood, stored, choose):
    rows = np.random.default_rng(0).permutation(240)[:90]
    rows = np.append(rows[rows > 64], [200, 100, 100])
    some = ExpressionRows(choose(stored(blood)), rows)
    assert some.shape == (len(rows), 765)
    found = np.full(some.shape, np.nan, dtype=np.float32)
    for positions, piece in some.pieces():
        assert piece.shape[0] <= 16 and (np.diff(rows[positions]) >= 0).all()
        assert np.isnan(found[positions]).all()
        found[positions] = piece.toarray()
    np.testing.assert_array_equal(found, blood.X.toarray()[rows])


def test_chunks_without_wanted_rows_are_not_read(blood, stored, choose, monkeypatch):
    from scdlkit.foundation import matrices

    expression, read, scanned = choose(stored(blood)), [], matrices.scan
    monkeypatch.setattr(matrices, "scan", lambda rows: read.append(rows.shape[0]) or scanned(rows))
    pieces = [len(positions) for positions, _ in ExpressionRows(expression, np.array([239, 3, 238])).pieces()]
    assert sum(pieces) == 3 and sum(read) <= 32


def test_the_digest_is_of_the_content(blood, stored, choose):
    rows = np.array([5, 200, 7])
    expected = ExpressionRows(choose(blood), rows).fingerprint()
    some = ExpressionRows(choose(stored(blood)), np.arange(240))
    assert some[rows].fingerprint() == some[:201][rows].fingerprint() == expected
    assert some[rows[::-1]].fingerprint() != expected
    order = np.random.default_rng(0).permutation(240)  # another order in the file is the same data
    assert ExpressionRows(choose(blood[order].copy()), np.argsort(order)[rows]).fingerprint() == expected
    blood.X.data[blood.X.indptr[200]] += 1
    assert ExpressionRows(choose(blood), rows).fingerprint() != expected
