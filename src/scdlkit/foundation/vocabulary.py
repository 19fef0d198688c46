"""The genes a checkpoint knows, and which of them a data set has.

Choices
-------
- A gene is looked up by exact symbol first, then without regard to case, then by Ensembl gene id (any version).
- A name in mouse style (``Cd3e``) never matches by case, and a match by case or by a renamed symbol never claims a token
  that another gene has by its exact name: mouse genes do not turn into human ones unseen.
- Several genes may share a token (duplicate symbols). They keep their token; the tokenizer adds their values up.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from scdlkit.foundation.gene_match import GeneMatch, check_overlap, minimum_overlap
from scdlkit.foundation.gene_names import (
    clean_names,
    ensembl_id,
    guess_naming,
    human_genes,
    human_symbols,
    looks_like_mouse,
)

__all__ = ["GeneMatch", "Vocabulary", "check_overlap", "minimum_overlap"]

_SPECIAL = re.compile(r"<.*>")
_LARGEST_ID = 10_000_000


class Vocabulary:
    """Token -> id of a checkpoint.

    Parameters
    ----------
    tokens
        Gene symbols and special tokens with their ids. Ids may have gaps; no two tokens share one.
    pad_token, cls_token
        The special tokens a cell is padded with and begins with.

    Raises
    ------
    ValueError
        If ids are shared, negative or too large, or a special token is missing.
    TypeError
        If an id is not an integer.

    Example
    -------
    >>> vocabulary = Vocabulary({"CD4": 0, "CD8A": 1, "<pad>": 2, "<cls>": 3})
    >>> vocabulary.match({"var_names": ["cd8a", "ENSG00000010610.10", "XYZ"]}).token_ids
    array([ 1,  0, -1], dtype=int32)
    """

    def __init__(self, tokens: Mapping[str, int], *, pad_token: str = "<pad>", cls_token: str = "<cls>") -> None:
        owner: dict[int, str] = {}
        for token, number in tokens.items():
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                raise TypeError(f"vocabulary: the id of {token!r} must be an integer, found {number!r}.")
            if not 0 <= number <= _LARGEST_ID:
                raise ValueError(f"vocabulary: the id of {token!r} must be from 0 to {_LARGEST_ID:,}, found {number}.")
            if number in owner:
                raise ValueError(f"vocabulary: {owner[number]!r} and {token!r} share the id {number}.")
            owner[int(number)] = token
        missing = [token for token in (pad_token, cls_token) if token not in tokens]
        if missing:
            raise ValueError(f"vocabulary: special tokens {missing} are missing among {len(tokens):,} tokens.")
        self.tokens: Mapping[str, int] = MappingProxyType({token: number for number, token in owner.items()})
        self.pad_id = self.tokens[pad_token]
        self.cls_id = self.tokens[cls_token]
        self._genes = {token: number for token, number in self.tokens.items() if not _SPECIAL.fullmatch(token)}
        self._size = max(owner) + 1

    @classmethod
    def from_json(cls, path: str | os.PathLike[str], **special: str) -> Vocabulary:
        """Read a ``vocab.json``: one JSON object, token -> id.

        Parameters
        ----------
        path
            The file.
        special
            ``pad_token`` and ``cls_token``, if they are not ``<pad>`` and ``<cls>``.

        Raises
        ------
        ValueError
            If the file is not such an object, or lists a token twice.
        """

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) != len(pairs):
                twice = [token for token, times in Counter(token for token, _ in pairs).items() if times > 1]
                raise ValueError(f"{len(twice)} tokens are listed twice, first {twice[0]!r}")
            return found

        try:
            tokens = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
            if not isinstance(tokens, dict):
                raise ValueError(f"expected one JSON object, found {type(tokens).__name__}")
        except ValueError as error:
            raise ValueError(f"{path} is not a vocabulary (token -> id): {error}.") from error
        return cls(tokens, **special)

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"Vocabulary({self.n_genes:,} genes, {len(self.tokens) - self.n_genes} special tokens)"

    @property
    def n_genes(self) -> int:
        """Tokens that are genes."""
        return len(self._genes)

    @cached_property
    def symbols(self) -> np.ndarray:
        """Token of each id (object array of length ``len(vocabulary)``); ``""`` for an id that no token has."""
        symbols = np.full(len(self), "", dtype=object)
        symbols[list(self.tokens.values())] = list(self.tokens)
        return symbols

    @cached_property
    def _by_upper(self) -> dict[str, int]:
        times = Counter(token.upper() for token in self._genes)
        return {token.upper(): number for token, number in self._genes.items() if times[token.upper()] == 1}

    @cached_property
    def _by_ensembl(self) -> dict[str, int]:
        genes = self._genes
        found = {}
        for gene, symbols in human_genes().items():
            known = next((genes[symbol] for symbol in symbols if symbol in genes), None)
            if known is not None:
                found[gene] = known
        # A token that carries the id itself (ENSG…, ENSG….2, SYMBOL_ENSG…) is the surer one; the plainest comes last.
        for token in sorted((token for token in genes if "ENSG" in token), key=len, reverse=True):
            if ensembl_id(token):
                found[ensembl_id(token)] = genes[token]
        return found

    def match(self, columns: Mapping[str, Iterable[object]]) -> GeneMatch:
        """Find the token of each gene.

        Parameters
        ----------
        columns
            Candidate names, in the order they are tried: ``{"var_names": [...], "feature_name": [...]}``. All of one length.

        Returns
        -------
        The match: per gene the first hit of exact symbol over all columns, then case-insensitive over all columns, then
        Ensembl id over all columns, then a symbol that the gene has had before or after.

        Raises
        ------
        ValueError
            If there is no column, or they differ in length.
        """
        cleaned = {column: clean_names(values) for column, values in columns.items()}
        lengths = {column: len(names) for column, names in cleaned.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must hold one name per gene each, found lengths {lengths}.")
        n_genes = next(iter(lengths.values()))
        token_ids = np.full(n_genes, -1, dtype=np.int32)
        how = np.full(n_genes, "", dtype=object)
        used: dict[str, int] = {}

        def look_up(way: str, find: Callable[[str], int | None], taken: frozenset[int] = frozenset()) -> None:
            for column, names in cleaned.items():
                hits = []
                for gene in np.flatnonzero(token_ids < 0).tolist():
                    token = find(names[gene]) if names[gene] else None
                    if token is not None and token not in taken:
                        hits.append((gene, token))
                if hits:
                    genes, tokens = map(list, zip(*hits, strict=True))
                    token_ids[genes], how[genes] = tokens, way
                    used[f"{column}:{way}"] = used.get(f"{column}:{way}", 0) + len(hits)

        look_up("symbol", self._genes.get)
        exact = frozenset(token_ids.tolist())
        look_up("case", lambda name: None if looks_like_mouse(name) else self._by_upper.get(name.upper()), exact)
        if (token_ids < 0).any():
            look_up("ensembl", lambda name: self._by_ensembl.get(ensembl_id(name)))
            claimed = frozenset(token_ids.tolist())
            look_up("ensembl", lambda name: self._by_ensembl.get(human_symbols().get(name, "")), claimed)

        known = token_ids >= 0
        names = np.array(next(iter(cleaned.values())), dtype=object)
        names[known] = self.symbols[token_ids[known]]
        if known.sum() >= minimum_overlap(n_genes, self.n_genes):
            guess = "Ensembl ids" if 2 * (how == "ensembl").sum() > known.sum() else "human symbols"
        else:
            guess = guess_naming(cleaned.values())
        return GeneMatch(token_ids, how, names, used, self.n_genes, guess)
