from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import scdlkit as sk
from scdlkit.foundation import TokenizerConfig
from scdlkit.foundation.tokens import tokenize


def test_fields(blood, checkpoint, tmp_path):
    vocab = json.loads((checkpoint / "vocab.json").read_text())
    before = blood.copy()
    assert sk.pp.tokenize(blood, checkpoint=checkpoint) is None
    ids = blood.var["scgpt_token_id"]
    assert ids.tolist() == [vocab.get(name, -1) for name in blood.var_names]
    bins = blood.layers["scgpt_bins"]
    assert bins.dtype == np.uint8 and sp.issparse(bins) and bins.format == "csr"
    known = (ids >= 0).to_numpy()
    np.testing.assert_array_equal((bins != 0).toarray()[:, known], (before.X != 0).toarray()[:, known])
    assert bins[:, ~known].nnz == 0 and bins.max() <= 50
    assert (blood.X != before.X).nnz == 0

    tokens = tokenize(blood.X, ids.to_numpy(), TokenizerConfig(seed=42))
    column = {token: i for i, token in enumerate(ids)}
    dense = np.zeros(blood.shape, np.uint8)
    for i in range(blood.n_obs):
        part = slice(tokens.indptr[i], tokens.indptr[i + 1])
        dense[i, [column[g] for g in tokens.gene_ids[part]]] = tokens.bins[part]
    np.testing.assert_array_equal(bins.toarray(), dense)

    blood.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").uns["scgpt_tokens"]["checkpoint"] == "flash_keys"


def test_copy_view_and_duplicates(blood, checkpoint):
    copied = sk.pp.tokenize(blood, checkpoint=checkpoint, copy=True)
    assert "scgpt_bins" in copied.layers and "scgpt_bins" not in blood.layers
    view = blood[:10]
    sk.pp.tokenize(view, checkpoint=checkpoint)
    np.testing.assert_array_equal(view.layers["scgpt_bins"].toarray(), copied.layers["scgpt_bins"][:10].toarray())
    assert "scgpt_bins" not in blood.layers

    with pytest.warns(
        UserWarning, match="not unique"
    ):  # every gene twice: the same ranks, written at the first of each
        twice = ad.concat([blood, blood], axis=1)
    sk.pp.tokenize(twice, checkpoint=checkpoint)
    bins = twice.layers["scgpt_bins"].toarray()
    np.testing.assert_array_equal(bins[:, :765], copied.layers["scgpt_bins"].toarray())
    assert (bins[:, 765:] == 0).all()


def test_errors_leave_the_data_alone(blood, checkpoint):
    with pytest.raises(ValueError, match="ties must be"):
        sk.pp.tokenize(blood, checkpoint=checkpoint, ties="none")
    with pytest.raises((KeyError, ValueError), match="nope"):
        sk.pp.tokenize(blood, checkpoint=checkpoint, layer="nope")
    assert "scgpt_token_id" not in blood.var
