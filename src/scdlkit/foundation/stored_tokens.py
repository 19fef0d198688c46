"""Tokens of many cells, which lie in one place once: any part of the cells is a list of rows of it, and copies nothing.

The place is memory, or, for more cells than memory holds, two files, written piece by piece, of which a batch reads only
its rows. A token takes 5 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .row_file import RowFile
from .tokens import Tokens, stretches

_PIECE = 4096  # cells that a pass over all of them reads at once
_TYPES: dict[str, np.dtype[Any]] = {"gene_ids": np.dtype(np.int32), "bins": np.dtype(np.uint8)}


class StoredTokens:
    """Rows of the cells whose tokens lie in files or in memory: like :class:`Tokens`, but for :meth:`load`, which reads them.

    Example
    -------
    >>> tokens = store_tokens(tokenize_pieces(chunks, token_ids), Path("/scratch"))
    >>> train = tokens[split.train]  # reads nothing
    >>> train[:64].load().gene_ids  # reads 64 cells
    """

    def __init__(
        self,
        place: TokenFiles | TokenArrays,
        starts: np.ndarray,
        lengths: np.ndarray,
        cell_keys: np.ndarray,
        n_expressed: np.ndarray,
    ) -> None:
        self._place, self._starts = place, starts
        self.lengths, self.cell_keys, self.n_expressed = lengths, cell_keys, n_expressed

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.lengths)

    @property
    def indptr(self) -> np.ndarray:
        """int64 ``[cells + 1]``: where each cell begins and ends in what :meth:`load` gives."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, index: Any) -> StoredTokens:
        """The cells at ``index`` (slice, integers or mask), in that order; still where they are."""
        rows = np.atleast_1d(np.arange(self.n_cells)[index])
        return StoredTokens(
            self._place, self._starts[rows], self.lengths[rows], self.cell_keys[rows], self.n_expressed[rows]
        )

    def load(self) -> Tokens:
        """Copy the tokens of all of these cells."""
        order = np.argsort(self._starts, kind="stable")  # files are read forwards
        starts, lengths = self._starts[order], self.lengths[order]
        parts = {name: self._place.read(name, starts, lengths) for name in _TYPES}
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        read = Tokens(indptr, parts["gene_ids"], parts["bins"], self.cell_keys[order], self.n_expressed[order])
        if (order[1:] > order[:-1]).all():
            return read
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return read[back]

    def genes(self) -> np.ndarray:
        """int32, sorted: every gene that one of the cells has."""
        seen = np.zeros(0, dtype=bool)
        for part in self[np.argsort(self._starts)]._parts():
            missing = int(part.gene_ids.max(initial=-1)) + 1 - len(seen)
            seen = np.pad(seen, (0, max(0, missing)))
            seen[part.gene_ids] = True
        return np.flatnonzero(seen).astype(np.int32)

    def fingerprint(self) -> str:
        """Hex digest of the content, the same as of :class:`Tokens`."""
        digest = hashlib.blake2b(self.indptr.data, digest_size=16)
        for name in _TYPES:
            for part in self._parts():
                digest.update(getattr(part, name).data)
        return digest.hexdigest()

    def _parts(self) -> Iterator[Tokens]:
        return (self[start : start + _PIECE].load() for start in range(0, self.n_cells, _PIECE))


AnyTokens = Tokens | StoredTokens


class TokenFiles:
    """One file for the genes of all tokens and one for their bins; gone with this object.

    Parameters
    ----------
    place
        Folder for the files; made if need be.

    Raises
    ------
    OSError
        If nothing can be written there.
    """

    def __init__(self, place: Path) -> None:
        self.files = {
            name: RowFile(place, dtype, content="tokens", needs="5 bytes a gene of each cell")
            for name, dtype in _TYPES.items()
        }

    @property
    def n_bytes(self) -> int:
        """Size of both files."""
        return sum(file.n_bytes for file in self.files.values())

    def append(self, tokens: Tokens) -> None:
        """Write the tokens of further cells; an OSError says what to do if they do not fit on the disk."""
        for name, file in self.files.items():
            file.append(getattr(tokens, name))

    def read(self, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of the cells at ascending places, one cell after another; see :meth:`RowFile.read`."""
        return self.files[name].read(starts, lengths)


class TokenArrays:
    """Tokens in memory, which are read as :class:`TokenFiles` are."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def read(self, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of the cells at ascending places, one cell after another."""
        tokens: np.ndarray = getattr(self._tokens, name)[stretches(starts, lengths)]
        return tokens


def keep_in_memory(tokens: Tokens) -> StoredTokens:
    """All cells of ``tokens``, of which any part can be taken without a copy."""
    return StoredTokens(TokenArrays(tokens), tokens.indptr[:-1], tokens.lengths, tokens.cell_keys, tokens.n_expressed)


def store_tokens(pieces: Iterable[Tokens], place: Path) -> tuple[StoredTokens, int]:
    """Write tokens to files as they come, so that no more than a piece of them is in memory.

    Parameters
    ----------
    pieces
        Tokens of consecutive cells, see :func:`scdlkit.foundation.tokens.tokenize_pieces`.
    place
        Folder for the files.

    Returns
    -------
    StoredTokens
        All cells.
    int
        Bytes on disk.

    Raises
    ------
    OSError
        If they do not fit on the disk.
    """
    files = TokenFiles(place)
    facts: list[tuple[np.ndarray, ...]] = [(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int32))]
    for piece in pieces:
        files.append(piece)
        facts.append((piece.lengths, piece.cell_keys, piece.n_expressed))
    lengths, cell_keys, n_expressed = (np.concatenate(parts) for parts in zip(*facts, strict=True))
    starts = np.cumsum(lengths) - lengths
    return StoredTokens(files, starts, lengths, cell_keys, n_expressed), files.n_bytes
