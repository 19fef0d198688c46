from __future__ import annotations

import numpy as np

from scdlkit.foundation.known_cells import KnownCells


def test_split_by_content():
    keys = np.array([9, 2**63 + 5, 4, 4, 7], dtype=np.uint64)
    known = KnownCells.of(keys, np.array([2, 0, 1, 0, -1]))
    # 4 is both a validation and a training cell: what was trained on must not pass for anything else
    np.testing.assert_array_equal(known.split_of(np.array([4, 2**63 + 5, 9, 7, 1], dtype=np.uint64)), [0, 0, 2, -1, -1])
    assert KnownCells.none().split_of(keys).tolist() == [-1] * 5


def test_embedding_by_content():
    keys = np.array([9, 4, 4], dtype=np.uint64)
    embedding = np.array([[1, 2], [3, 4], [3, 4]], dtype=np.float32)
    known = KnownCells.of(keys, np.array([0, 1, 1])).with_embedding(keys, embedding)
    found = known.embedding_of(np.array([4, 5, 9], dtype=np.uint64))
    np.testing.assert_array_equal(found, np.array([[3, 4], [np.nan, np.nan], [1, 2]], dtype=np.float32))
    assert KnownCells.none().embedding_of(keys) is None
