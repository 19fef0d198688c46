"""What the look-up of genes in a vocabulary found, and whether it is enough to go on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import ceil

import numpy as np

_FEW_GENES = 200
_ADVICE_FOREIGN = {
    "mouse symbols": "These look like mouse (or rat) symbols; the checkpoint knows human genes. Map them to human "
    "orthologs first. If they are human genes in this spelling: adata.var_names = adata.var_names.str.upper().",
    "mouse Ensembl ids": "These look like mouse Ensembl ids (ENSMUSG…); the checkpoint knows human genes. Map them to human "
    "orthologs first.",
    "other-species Ensembl ids": "These look like gene ids of another species; the checkpoint knows human genes. Map them "
    "to human orthologs first.",
}
_ADVICE = {
    "Ensembl ids": "These look like human Ensembl ids of genes that the checkpoint does not have.",
    "human symbols": "These look like human symbols of genes that the checkpoint does not have.",
    "unknown": "Put human gene symbols or Ensembl ids (ENSG…) into adata.var_names, or into a column of adata.var named "
    "'feature_name', 'gene_symbols' or 'gene_ids'.",
}


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """Which token each gene of a data set has.

    Attributes
    ----------
    token_ids
        int32, one a gene; -1 where the checkpoint does not know the gene.
    how
        ``"symbol"`` (exact), ``"case"`` (only the case differs), ``"ensembl"`` (through an Ensembl gene id: the gene's own, or
        the one its symbol stood for before or after a renaming) or ``""`` (unknown).
    names
        The vocabulary's symbol where there is one, else the gene's own first name.
    columns_used
        Matched genes per ``"column:how"``, for example ``{"var_names:symbol": 18000, "gene_ids:ensembl": 212}``.
    n_vocabulary
        Genes in the vocabulary.
    guess
        What the names look like: ``"human symbols"``, ``"Ensembl ids"``, ``"mouse symbols"``, ``"mouse Ensembl ids"``,
        ``"other-species Ensembl ids"`` or ``"unknown"``.
    """

    token_ids: np.ndarray
    how: np.ndarray
    names: np.ndarray
    columns_used: dict[str, int] = field(repr=False)
    n_vocabulary: int
    guess: str

    @property
    def n_genes(self) -> int:
        """Genes in the data set."""
        return len(self.token_ids)

    @property
    def n_matched(self) -> int:
        """Genes that have a token."""
        return int((self.token_ids >= 0).sum())

    @property
    def known_ids(self) -> np.ndarray:
        """int32, the distinct tokens, sorted."""
        return np.unique(self.token_ids[self.token_ids >= 0])

    @property
    def n_tokens(self) -> int:
        """Distinct tokens."""
        return len(self.known_ids)

    @property
    def n_duplicates(self) -> int:
        """Genes beyond the first that share a token."""
        return self.n_matched - self.n_tokens

    @property
    def overlap(self) -> float:
        """Share of the data set's genes that have a token."""
        return self.n_matched / self.n_genes if self.n_genes else 0.0

    @property
    def matched_how(self) -> dict[str, int]:
        """Matched genes per way of matching."""
        return {way: int((self.how == way).sum()) for way in ("symbol", "case", "ensembl")}


def minimum_overlap(n_genes: int, n_vocabulary: int) -> int:
    """Fewest genes that must match: a tenth of the smaller of data set and vocabulary, and at least 10.

    Human data in whatever naming matches half of its genes or more; another species or an unknown naming next to none.
    A tenth tells these apart for whole transcriptomes, for panels of a few hundred genes and for small vocabularies.
    """
    return max(10, ceil(min(n_genes, n_vocabulary) / 10))


def check_overlap(match: GeneMatch, minimum: int | None = None) -> None:
    """Refuse a data set of which the checkpoint knows too few genes.

    Parameters
    ----------
    match
        From :meth:`Vocabulary.match`.
    minimum
        Fewest matched genes; :func:`minimum_overlap` if not given.

    Raises
    ------
    ValueError
        With matched / needed and what the names look like; always for mouse and other species.

    Warns
    -----
    UserWarning
        If fewer than 200 genes match: a cell then has few tokens to go by.

    Example
    -------
    >>> check_overlap(vocabulary.match({"var_names": adata.var_names}))  # doctest: +SKIP
    """
    needed = max(1, minimum_overlap(match.n_genes, match.n_vocabulary) if minimum is None else minimum)
    foreign = match.guess in _ADVICE_FOREIGN
    if match.n_matched < needed or foreign:
        examples = ", ".join(repr(name) for name in match.names[match.token_ids < 0][:3])
        advice = (_ADVICE_FOREIGN | _ADVICE).get(match.guess, "")
        raise ValueError(
            f"Too few genes are known to the checkpoint: {match.n_matched:,} matched of {match.n_genes:,}, "
            f"{needed:,} needed (unmatched: {examples}). {advice}"
        )
    if match.n_matched < _FEW_GENES:
        warnings.warn(
            f"Only {match.n_matched} genes are known to the checkpoint; embeddings from so few are weak.", stacklevel=2
        )
