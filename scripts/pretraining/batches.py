"""Batches for pretraining: thinned counts, random genes, masks; a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from scdlkit.foundation.model import ScGPTConfig
from scdlkit.foundation.tokens import TokenizerConfig, Tokens, tokenize

from .config import PretrainingConfig
from .corpus import Corpus
from .objective import PretrainingBatch


class BatchSource:
    """Draws batches from a corpus.

    Parameters
    ----------
    corpus
        Cells.
    config
        Recipe.
    encoder
        Shape of the encoder.
    """

    def __init__(self, corpus: Corpus, config: PretrainingConfig, encoder: ScGPTConfig) -> None:
        self.corpus, self.config, self.encoder = corpus, config, encoder
        self.cells_of = [np.flatnonzero(corpus.source == code) for code in range(len(corpus.names))]
        sizes = np.array([len(cells) for cells in self.cells_of], dtype=float) ** config.source_temperature
        self.source_share = sizes / sizes.sum()
        self.token_ids = corpus.token_ids
        # genes in many cells are asked more often; genes in a handful of cells hardly teach anything
        frequency = np.bincount(corpus.counts.indices, minlength=corpus.counts.shape[1]) / corpus.counts.shape[0]
        self.query_share = frequency**config.query_temperature / (frequency**config.query_temperature).sum()
        spread = np.sqrt(frequency * (1 - frequency))
        self.query_weight = (1 / (spread + 0.1)).astype(np.float32)
        # a deeper cell expresses more of every gene, most of all of those that half of the cells express
        self.query_trend = np.column_stack([np.ones_like(frequency), frequency, spread, spread**2]).astype(np.float32)

    def draw(self, step: int) -> PretrainingBatch:
        """The batch of one step."""
        config, encoder = self.config, self.encoder
        rng = np.random.default_rng([config.seed, step])
        n_distinct = config.batch_size // 2 if config.two_views else config.batch_size
        n_sources = 1 if config.one_source else n_distinct
        source = np.resize(rng.choice(len(self.cells_of), size=n_sources, p=self.source_share), n_distinct)
        cells = np.concatenate(  # no cell twice: it would be its own negative in the contrastive loss
            [
                rng.choice(self.cells_of[code], size=n, replace=False)
                for code, n in zip(*np.unique(source, return_counts=True), strict=True)
            ]
        )
        counts = self.corpus.counts[cells]
        truth = _dense_bins(counts, self.token_ids, encoder.n_bins)
        if config.two_views:
            counts, truth = sp.vstack([counts, counts], format="csr"), np.concatenate([truth, truth])

        n_genes = int(rng.integers(*config.genes_per_draw, endpoint=True))
        seed = int(rng.integers(2**62))
        tokens = tokenize(
            self._thin(counts, rng), self.token_ids, TokenizerConfig(encoder.n_bins, n_genes + 1, seed=seed)
        )
        gene_ids, values, padding, n_known = self._split(tokens, float(rng.choice(config.mask_ratios)), rng)
        queries = rng.choice(len(self.query_share), size=config.n_queries, replace=False, p=self.query_share)
        weights = self.query_weight[queries]
        asked = gene_ids[:, n_known:]
        return PretrainingBatch(
            torch.from_numpy(gene_ids),
            torch.from_numpy(values),
            torch.from_numpy(padding),
            n_known,
            torch.from_numpy(np.take_along_axis(truth, asked, 1)),
            torch.from_numpy(queries),
            torch.from_numpy(truth[:, queries]),
            torch.from_numpy(weights / weights.mean()),
            torch.from_numpy(self.query_trend[queries]),
        )

    def _split(
        self, tokens: Tokens, ratio: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Mask a share of each cell's genes.

        Returns vocabulary ids, values and padding ``[cells, L]``, and the positions up to the first masked gene:
        ``<cls>`` and known genes come first, then masked ones, at most ``max_asked`` of them.
        """
        lengths = tokens.lengths
        there = np.arange(lengths.max()) < lengths[:, None]
        order = np.argsort(np.where(there, rng.random(there.shape), 2), axis=1)
        ids, bins = np.zeros(there.shape, np.int64), np.zeros(there.shape, np.float32)
        ids[there], bins[there] = tokens.gene_ids, tokens.bins
        ids, bins = np.take_along_axis(ids, order, 1), np.take_along_axis(bins, order, 1)
        known = np.maximum(lengths - np.rint(ratio * lengths).astype(int), np.minimum(lengths, 1))[:, None]
        asked = np.minimum(lengths[:, None] - known, self.config.max_asked)
        first = np.arange(known.max())
        later = np.arange(asked.max())
        place = np.concatenate([np.broadcast_to(first, (len(ids), len(first))), known + later], 1)
        padding = np.concatenate([first >= known, later >= asked], 1)
        place[padding] = 0
        ids, bins = np.take_along_axis(ids, place, 1), np.take_along_axis(bins, place, 1)
        bins[:, len(first) :] = self.encoder.mask_value
        ids[padding], bins[padding] = self.corpus.vocab["<pad>"], self.encoder.pad_value
        start = ((0, 0), (1, 0))
        return (
            np.pad(ids, start, constant_values=self.corpus.vocab["<cls>"]),
            np.pad(bins, start, constant_values=self.encoder.pad_value),
            np.pad(padding, start, constant_values=False),
            len(first) + 1,
        )

    def _thin(self, counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
        """Keep each molecule with a probability drawn per cell."""
        keep = rng.uniform(*self.config.thinning, size=counts.shape[0])
        thinned = counts.copy()
        thinned.data = rng.binomial(counts.data.astype(np.int64), np.repeat(keep, np.diff(counts.indptr)))
        thinned.data = thinned.data.astype(np.float32)
        thinned.eliminate_zeros()
        return thinned


def _dense_bins(counts: sp.csr_matrix, token_ids: np.ndarray, n_bins: int) -> np.ndarray:
    """float32 ``[cells, tokens]``: bins of whole cells, ties in the middle of what they may get, 0 where silent."""
    tokens = tokenize(counts, token_ids, TokenizerConfig(n_bins, max_length=counts.shape[1] + 1, ties="mid"))
    dense = np.zeros(counts.shape, np.float32)
    dense[np.repeat(np.arange(tokens.n_cells), tokens.lengths), tokens.gene_ids] = tokens.bins
    return dense
