"""Tokens of all cells, kept in the AnnData for inspection or for models of one's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp

from scdlkit._annotation import check_target, to_actual
from scdlkit._keys import BINS_LAYER, TOKEN_ID, TOKENS_UNS
from scdlkit.foundation._download import file_sha256
from scdlkit.foundation.checkpoints import ensure_checkpoint
from scdlkit.foundation.expression import check_overlap, choose_expression
from scdlkit.foundation.tokens import TokenizerConfig
from scdlkit.foundation.vocabulary import Vocabulary
from scdlkit.inspection import tokenize_expression

if TYPE_CHECKING:
    from anndata import AnnData


def tokenize(
    adata: AnnData,
    *,
    checkpoint: str | os.PathLike[str] = "whole-human",
    layer: str | None = None,
    max_length: int | None = None,
    ties: Literal["random", "mid"] = "random",
    duplicates: Literal["sum", "first"] = "sum",
    random_state: int = 42,
    copy: bool = False,
) -> AnnData | None:
    """Write the scGPT tokens of every cell into the AnnData.

    ``sk.tl`` functions tokenize on their own; use this to look at the tokens or to feed a model of your own.

    Parameters
    ----------
    adata
        Cells x genes.
    checkpoint
        Registered name or folder in the official layout.
    layer
        Which matrix; ``.X`` by default (never ``.raw``, whose genes could not be written back).
    max_length
        Most tokens of a cell, ``<cls>`` included; the checkpoint's by default.
    ties, duplicates, random_state
        See :class:`scdlkit.foundation.TokenizerConfig`.
    copy
        Return a changed copy instead of changing ``adata``.

    Returns
    -------
    AnnData or None
        Sets the following fields:

        ``adata.var["scgpt_token_id"]``
            int32, vocabulary id of each gene, -1: unknown to the checkpoint.
        ``adata.layers["scgpt_bins"]``
            CSR uint8, cells x genes: the bin of each token, 0: no token. Genes that share a token have their common
            bin at the first of them.
        ``adata.uns["scgpt_tokens"]``
            checkpoint, sha256 of its vocabulary, and the settings.

    Raises
    ------
    ValueError
        If the matrix or the genes cannot be used; the message says why.

    Example
    -------
    >>> sk.pp.tokenize(adata, checkpoint="mini")
    >>> adata.layers["scgpt_bins"]
    """
    check_target(adata, copy=copy)
    found = ensure_checkpoint(checkpoint, weights=False)
    vocabulary = Vocabulary.from_json(found.vocab_path)
    config = TokenizerConfig.from_args(
        found.args(), max_length=max_length, ties=ties, duplicates=duplicates, seed=random_state
    )
    expression = choose_expression(adata, vocabulary, layer=layer, use_raw=False)
    check_overlap(expression.genes)
    tokens = tokenize_expression(expression, config)
    token_ids = expression.genes.token_ids
    column_of = np.full(len(vocabulary), -1, dtype=np.int64)
    known = np.flatnonzero(token_ids >= 0)[::-1]
    column_of[token_ids[known]] = known  # the first of several genes with one token is written last and stays
    bins = sp.csr_matrix(
        (tokens.bins, column_of[tokens.gene_ids], tokens.indptr), shape=(tokens.n_cells, len(token_ids))
    )
    bins.sort_indices()
    target = adata.copy() if copy else adata
    to_actual(target)
    target.var[TOKEN_ID] = token_ids.astype(np.int32)
    target.layers[BINS_LAYER] = bins
    target.uns[TOKENS_UNS] = {
        "checkpoint": found.name,
        "vocabulary_sha256": file_sha256(found.vocab_path),
        "matrix": expression.source,
        "values": expression.kind,
        "n_bins": config.n_bins,
        "max_length": config.max_length,
        "ties": config.ties,
        "duplicates": config.duplicates,
        "random_state": config.seed,
    }
    return target if copy else None
