from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdlkit.foundation.strategies import CellData
from scdlkit.foundation.tokens import tokenize


def test_subset_and_only(train: CellData) -> None:
    index = np.array([5, 2])
    some = train.subset(index)
    assert some.n_cells == 2
    np.testing.assert_array_equal(some.codes, train.codes[index])
    np.testing.assert_array_equal(some.expression.toarray(), train.expression[index].toarray())
    slim = train.only({"embedding"})
    assert slim.expression is None
    assert slim.gene_names is None
    assert slim.kind == ""
    assert slim.codes is train.codes


def test_tokens_are_a_part() -> None:
    tokens = tokenize(sp.csr_matrix(np.eye(3, dtype=np.float32)), np.arange(3))
    cells = CellData(tokens=tokens, codes=np.arange(3))
    assert cells.subset(np.array([2])).tokens.gene_ids.tolist() == [2]
    assert CellData(tokens=tokens).n_cells == 3
    assert CellData().n_cells == 0


def test_parts_must_agree(train: CellData) -> None:
    with pytest.raises(ValueError, match="'embedding': 120, 'codes': 3"):
        CellData(embedding=train.embedding, codes=np.arange(3))
    with pytest.raises(ValueError, match="0 names for 60 genes"):
        CellData(expression=train.expression)
