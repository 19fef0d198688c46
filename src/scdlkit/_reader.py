"""From the cells of an AnnData to tokens and frozen embeddings, for one checkpoint and one set of choices."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from ._settings import logger, settings
from .foundation import matrices
from .foundation._device import embedding_precision, resolve_device
from .foundation.embedding_cache import cached
from .foundation.expression import Expression, check_overlap, choose_expression
from .foundation.expression_rows import ExpressionRows
from .foundation.inference import embed_tokens
from .foundation.stored_tokens import AnyTokens, StoredTokens, keep_in_memory, store_tokens
from .foundation.strategies import CellData
from .foundation.tokens import TokenizerConfig, Tokens
from .foundation.vocabulary import Vocabulary
from .foundation.weights import load_encoder
from .inspection import token_pieces, tokenize_expression

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor

    from .foundation.checkpoints import Checkpoint
    from .foundation.known_cells import KnownCells
    from .foundation.model import ScGPTEncoder
    from .foundation.strategies import Strategy

_TOKEN_BYTES = 5
_SHARE_OF_MEMORY = 0.25  # of what is free, beyond which tokens go to files


def scratch_folder(place: Path | None) -> Path:
    """Where large temporary files go: the setting ``temp_dir``, else ``place``, else the system's folder for them."""
    return settings.temp_dir or place or Path(tempfile.gettempdir())


class CellReader:
    """Reads cells the same way every time.

    Parameters
    ----------
    checkpoint
        A verified checkpoint.
    tokenizer
        How cells become tokens; draw ``k`` adds ``k`` to its seed.
    n_draws
        Draws of ties and gene subsets; embeddings are averaged over them.
    layer, use_raw
        Which matrix.
    device, precision, progress
        As everywhere; the settings at the time of use by default.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: TokenizerConfig,
        *,
        n_draws: int = 1,
        layer: str | None = None,
        use_raw: bool | None = None,
        device: str | None = None,
        precision: str | None = None,
        progress: bool | None = None,
    ) -> None:
        if n_draws < 1:
            raise ValueError(f"n_draws must be at least 1, found {n_draws}.")
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.n_draws = n_draws
        self.layer, self.use_raw = layer, use_raw
        self.device, self.precision, self.progress = device, precision, progress
        self.vocabulary = Vocabulary.from_json(checkpoint.vocab_path)
        self._encoder: ScGPTEncoder | None = None
        self._genes = np.empty(0, dtype=np.int64)

    def at(self, precision: str) -> CellReader:
        """The same reader in another precision."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def choose(self, adata: AnnData) -> Expression:
        """The matrix with its matched genes.

        Raises
        ------
        ValueError
            If there are no cells, too few known genes, or values that are negative or not finite.
        """
        expression = choose_expression(adata, self.vocabulary, layer=self.layer, use_raw=self.use_raw)
        check_overlap(expression.genes)
        return expression

    def tokenize(self, expression: Expression) -> list[Tokens]:
        """One set of tokens a draw."""
        self._genes = expression.genes.known_ids
        return [tokenize_expression(expression, self.tokenizer.draw(k)) for k in range(self.n_draws)]

    def read(self, adata: AnnData, *, place: Path | None = None) -> tuple[Expression, list[StoredTokens]]:
        """:meth:`choose` and :meth:`tokenize` in one, for cells that may not fit into memory.

        Tokens are written to files where the matrix is not in memory either, or they might take over a quarter of the
        memory that is free: in the setting ``temp_dir``, else in ``place``, else where the system has temporary files.
        """
        expression = self.choose(adata)
        if not self._in_files(expression):
            return expression, [keep_in_memory(tokens) for tokens in self.tokenize(expression)]
        place = scratch_folder(place)
        self._genes = expression.genes.known_ids
        draws: list[StoredTokens] = []
        n_bytes = 0
        for k in range(self.n_draws):
            tokens, size = store_tokens(token_pieces(expression, self.tokenizer.draw(k)), place)
            draws.append(tokens)
            n_bytes += size
        logger.info(
            "The tokens of %d cells are kept in files in %s (%.0f MB), not in memory, until the fits are done.",
            expression.n_cells, place, n_bytes / 1e6,
        )  # fmt: skip
        return expression, draws

    def _in_files(self, expression: Expression) -> bool:
        matrix = expression.matrix
        if not matrices.in_memory(matrix):
            return True
        values = matrix.nnz if hasattr(matrix, "nnz") else matrix.size
        most = min(values, expression.n_cells * (self.tokenizer.max_length - 1)) * self.n_draws
        return bool(_TOKEN_BYTES * most > _SHARE_OF_MEMORY * psutil.virtual_memory().available)

    def embed(
        self, draws: Sequence[AnyTokens], *, known: KnownCells | None = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Frozen embedding float32 ``[cells, embsize]``, not normalised; rows of cells without tokens are zero.

        Cells in ``known`` are looked up instead of computed.
        """
        embedding = None if known is None else known.embedding_of(draws[0].cell_keys)
        if embedding is None:
            new = np.arange(draws[0].n_cells)
        else:
            new = np.flatnonzero(np.isnan(embedding[:, 0]))
        if embedding is not None and not len(new):
            return embedding
        encoder = self._encoder_for(draws)
        if embedding is None:
            embedding = np.empty((len(new), encoder.config.embsize), dtype=np.float32)
        parts = [tokens if len(new) == tokens.n_cells else tokens[new] for tokens in draws]
        device = resolve_device(self.device)
        embedding[new] = cached(
            lambda: self._compute(encoder, parts, batch_size),
            parts,
            checkpoint_sha256=self.checkpoint.sha256,
            precision=embedding_precision(self.precision, device),
            device=device,
        )
        return embedding

    def _compute(self, encoder: ScGPTEncoder, draws: Sequence[AnyTokens], batch_size: int | None) -> np.ndarray:
        """Mean embedding over the draws."""
        each = (
            embed_tokens(
                encoder,
                tokens,
                cls_id=self.vocabulary.cls_id,
                pad_id=self.vocabulary.pad_id,
                device=self.device,
                batch_size=batch_size,
                precision=self.precision,
                progress=self.progress,
            )
            for tokens in draws
        )
        if len(draws) == 1:  # a sum in float64 would need three times the memory
            return next(each)
        total = sum(each, np.zeros((draws[0].n_cells, encoder.config.embsize)))
        return (total / len(draws)).astype(np.float32)

    def cells(
        self,
        expression: Expression,
        draws: Sequence[AnyTokens],
        rows: np.ndarray,
        strategies: Sequence[Strategy],
        *,
        known: KnownCells | None = None,
        embed: bool = True,
    ) -> CellData:
        """What the strategies read of the cells at ``rows``; cells in ``known`` are not embedded again."""
        embedding = self.embed([tokens[rows] for tokens in draws], known=known) if embed else None
        cells = CellData(embedding=embedding, tokens=draws[0][rows])
        if not any("expression" in strategy.needs for strategy in strategies):
            return cells
        genes = expression.genes.names
        return replace(cells, expression=ExpressionRows(expression, rows), gene_names=genes, kind=expression.kind)

    @property
    def embsize(self) -> int:
        """Width of the embedding."""
        return int(self.checkpoint.args()["embsize"])

    @property
    def cls_id(self) -> int:
        """Vocabulary id of ``<cls>``."""
        return self.vocabulary.cls_id

    @property
    def pad_id(self) -> int:
        """Vocabulary id of ``<pad>``."""
        return self.vocabulary.pad_id

    def encoder(self, token_ids: np.ndarray) -> ScGPTEncoder:
        """A fresh pretrained encoder with rows for these tokens, for a strategy to change."""
        return load_encoder(self.checkpoint, token_ids=token_ids)

    def gene_rows(self, token_ids: np.ndarray) -> Tensor:
        """Pretrained rows of the gene embedding, in the order of ``token_ids``."""
        encoder = self.encoder(token_ids)
        return encoder.gene_embedding.weight.detach()[encoder.row_of[torch.from_numpy(token_ids.astype(np.int64))]]

    def _encoder_for(self, draws: Sequence[AnyTokens]) -> ScGPTEncoder:
        """The encoder with rows for these genes, and for all others of the data; kept for the next call."""
        needed = np.unique(np.concatenate([tokens.genes() for tokens in draws]))
        if self._encoder is None or len(np.setdiff1d(needed, self._encoder.token_ids)):
            self._encoder = load_encoder(self.checkpoint, token_ids=np.union1d(needed, self._genes))
        return self._encoder
