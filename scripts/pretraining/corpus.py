"""The cells to learn from: every data set on one gene axis, and gene vectors from their co-expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eoc>")


@dataclass(frozen=True)
class Corpus:
    """Counts of all cells, one column per token of the vocabulary.

    Parameters
    ----------
    counts
        float32 CSR ``[cells, tokens]``; the columns of the special tokens are empty.
    source
        int ``[cells]``: data set of each cell, a position in ``names``.
    names
        Data sets, in alphabetical order.
    vocab
        Token to id.
    """

    counts: sp.csr_matrix
    source: np.ndarray
    names: tuple[str, ...]
    vocab: dict[str, int]

    @property
    def token_ids(self) -> np.ndarray:
        """Vocabulary id of each column, -1 for the special tokens."""
        ids = np.arange(self.counts.shape[1])
        ids[[self.vocab[token] for token in SPECIAL_TOKENS]] = -1
        return ids


def read_corpus(folder: str | Path, *, min_cells: int, exclude: Sequence[str] = ()) -> Corpus:
    """Read every ``.h5ad`` of a folder: counts in ``X``, gene symbols as variable names; labels are not looked at.

    Parameters
    ----------
    folder
        Folder with the data sets.
    min_cells
        A gene enters the vocabulary if at least that many cells express it, over all data sets.
    exclude
        Data sets (file names without suffix) to leave out, for evaluation on unseen data.

    Raises
    ------
    ValueError
        If no file is left, or a matrix does not hold counts.
    """
    paths = [path for path in sorted(Path(folder).glob("*.h5ad")) if path.stem not in exclude]
    if not paths:
        raise ValueError(f"folder {folder} holds no .h5ad file to learn from.")
    matrices, symbols = [], []
    for path in paths:
        adata = ad.read_h5ad(path)
        matrix = sp.csr_matrix(adata.X, dtype=np.float32)
        if matrix.nnz and (matrix.data.min() < 0 or (matrix.data != np.rint(matrix.data)).any()):
            raise ValueError(f"{path.name} must hold counts in X, found values that are negative or not whole.")
        matrices.append(matrix)
        symbols.append(adata.var_names.to_numpy(dtype=str))
    vocab = _choose_vocabulary(matrices, symbols, min_cells)
    counts = sp.vstack([_to_tokens(*pair, vocab) for pair in zip(matrices, symbols, strict=True)], format="csr")
    source = np.repeat(np.arange(len(paths)), [matrix.shape[0] for matrix in matrices])
    return Corpus(counts, source, tuple(path.stem for path in paths), vocab)


def gene_vectors(corpus: Corpus, size: int, *, scale: float, seed: int) -> np.ndarray:
    """Vectors of genes that are close when the same cells express them.

    Truncated SVD of the positive pointwise mutual information between cells and genes (Levy and Goldberg 2014), taken
    within each data set so that the data set itself explains nothing. The right singular vectors factorise the
    gene-gene co-occurrence. A first, constant coordinate carries what the rest does not: the encoder normalises every
    gene vector to one length, and genes that tell nothing about the cell would otherwise be as loud as markers. Two more
    carry how often and how strongly a gene is expressed, the first thing that the decoders must know.

    Parameters
    ----------
    corpus
        Cells.
    size
        Coordinates per gene.
    scale
        Root mean square length of the informative part relative to the constant coordinate.
    seed
        Seed of the randomised SVD.

    Returns
    -------
    ndarray
        float32 ``[tokens, size]``; rows of special tokens are random.
    """
    blocks = []
    for code in range(len(corpus.names)):
        block = corpus.counts[corpus.source == code].copy()
        block.data = np.log1p(block.data * np.repeat(1e4 / np.maximum(_sums(block, 1), 1), np.diff(block.indptr)))
        cells, genes = _sums(block, 1), np.maximum(_sums(block, 0), 1)
        expected = np.repeat(cells, np.diff(block.indptr)) * genes[block.indices] / block.data.sum()
        block.data = np.maximum(np.log(block.data / expected), 0).astype(np.float32)
        # every data set has the same say, whatever its number of cells
        blocks.append(block / np.sqrt(block.multiply(block).sum() / 1e4))
    stacked = sp.vstack(blocks, format="csr")
    _, strength, right = randomized_svd(stacked, size - 3, n_iter=5, random_state=seed)
    vectors = right.T * np.sqrt(strength)
    vectors *= scale / np.sqrt((vectors**2).sum(1).mean())
    vectors = np.column_stack([np.ones(len(vectors)), _level(corpus), vectors]).astype(np.float32)
    special = [corpus.vocab[token] for token in SPECIAL_TOKENS]
    vectors[special] = np.random.default_rng(seed).normal(size=(len(special), size)) / np.sqrt(size)
    return vectors


def _level(corpus: Corpus) -> np.ndarray:
    """``[tokens, 2]``: log share of cells that express a gene, and its mean rank among the genes of a cell; z-scores."""
    counts = corpus.counts
    cells = np.bincount(counts.indices, minlength=counts.shape[1])
    depth = np.repeat(_sums(counts, 1) / np.maximum(np.diff(counts.indptr), 1), np.diff(counts.indptr))
    strength = np.bincount(counts.indices, np.log(counts.data / depth), minlength=counts.shape[1]) / np.maximum(
        cells, 1
    )
    level = np.column_stack([np.log(cells + 1), strength])
    return (level - level.mean(0)) / level.std(0)


def _sums(matrix: sp.csr_matrix, axis: int) -> np.ndarray:
    return np.asarray(matrix.sum(axis)).ravel()


def _choose_vocabulary(matrices: list[sp.csr_matrix], symbols: list[np.ndarray], min_cells: int) -> dict[str, int]:
    """Genes in alphabetical order, then the special tokens, as in the official vocabulary."""
    seen: dict[str, int] = {}
    for matrix, names in zip(matrices, symbols, strict=True):
        for name, cells in zip(names, np.bincount(matrix.indices[matrix.data > 0], minlength=len(names)), strict=True):
            seen[str(name)] = seen.get(str(name), 0) + int(cells)
    genes = sorted(name for name, cells in seen.items() if cells >= min_cells and name not in SPECIAL_TOKENS)
    return {token: index for index, token in enumerate([*genes, *SPECIAL_TOKENS])}


def _to_tokens(matrix: sp.csr_matrix, names: np.ndarray, vocab: dict[str, int]) -> sp.csr_matrix:
    """Columns of one data set to columns of the vocabulary; columns of the same symbol are summed."""
    ids = np.array([vocab.get(str(name), -1) for name in names])
    known = np.flatnonzero(ids >= 0)
    move = sp.csr_matrix(
        (np.ones(len(known), np.float32), (known, ids[known])), shape=(matrix.shape[1], len(vocab)), dtype=np.float32
    )
    moved = sp.csr_matrix(matrix @ move)
    moved.sort_indices()
    return moved
