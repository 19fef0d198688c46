"""Tokens of more cells than memory holds: in two files, written piece by piece, of which a batch reads only its rows.

A token takes 5 bytes. The files have no name (where the system allows it), so nothing is left of them when their last
reader is gone, even if the process is killed. They are read, not mapped: what the system caches of them then counts as
cache and not as memory of the process. Sequential, random or repeated, most reads are served by that cache.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from .tokens import Tokens

_PIECE = 4096  # cells that a pass over all of them reads at once
_TYPES: dict[str, np.dtype[Any]] = {"gene_ids": np.dtype(np.int32), "bins": np.dtype(np.uint8)}


class StoredTokens:
    """Tokens in files, of the cells at some rows of them: like :class:`Tokens`, but for :meth:`load`, which reads them.

    Example
    -------
    >>> tokens = store_tokens(tokenize_pieces(chunks, token_ids), Path("/scratch"))
    >>> train = tokens[split.train]  # reads nothing
    >>> train[:64].load().gene_ids  # reads 64 cells
    """

    def __init__(
        self, files: TokenFiles, starts: np.ndarray, lengths: np.ndarray, cell_keys: np.ndarray, n_expressed: np.ndarray
    ) -> None:
        self._files, self._starts = files, starts
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
        """The cells at ``index`` (slice, integers or mask), in that order; still in the files."""
        rows = np.atleast_1d(np.arange(self.n_cells)[index])
        return StoredTokens(
            self._files, self._starts[rows], self.lengths[rows], self.cell_keys[rows], self.n_expressed[rows]
        )

    def load(self) -> Tokens:
        """Read all of these cells into memory."""
        order = np.argsort(self._starts, kind="stable")  # the files are read forwards
        starts, lengths = self._starts[order], self.lengths[order]
        parts = {name: self._files.read(name, starts, lengths) for name in _TYPES}
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
        self.place = place
        self._lock = threading.Lock()  # a read moves the position in the file
        self._files: dict[str, IO[bytes]] = {}
        opened = ExitStack()
        weakref.finalize(self, opened.close)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name in _TYPES:
                self._files[name] = tempfile.TemporaryFile(dir=place, prefix="scdlkit-tokens-")
                opened.callback(self._files[name].close)
        except OSError as error:
            raise self._explained(error) from error

    @property
    def n_bytes(self) -> int:
        """Size of both files."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    def append(self, tokens: Tokens) -> None:
        """Write the tokens of further cells; an OSError says what to do if they do not fit on the disk."""
        for name, file in self._files.items():
            data = getattr(tokens, name)
            try:
                before = file.seek(0, os.SEEK_END)
                file.write(data.data)
                file.flush()
                if (after := os.fstat(file.fileno()).st_size) != before + data.nbytes:
                    raise OSError(f"{after - before:,} of {data.nbytes:,} bytes were written")
            except OSError as error:
                raise self._explained(error) from error

    def read(self, name: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens of the cells at ascending places, one cell after another.

        Raises
        ------
        OSError
            If the file is shorter than what was written.
        """
        result = np.empty(int(lengths.sum()), dtype=_TYPES[name])
        if not len(result):
            return result
        size, file, ends = _TYPES[name].itemsize, self._files[name], starts + lengths
        first = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))  # of cells that follow each other
        last = np.concatenate([first[1:], [len(starts)]]) - 1
        content, at = memoryview(result.data).cast("B"), 0
        with self._lock:
            for start, end in zip((starts[first] * size).tolist(), (ends[last] * size).tolist(), strict=True):
                file.seek(start)
                if file.readinto(content[at : at + end - start]) != end - start:  # type: ignore[attr-defined]
                    raise OSError(f"The file of tokens in {self.place} was cut off; is the disk at fault?")
                at += end - start
        return result

    def _explained(self, error: OSError) -> OSError:
        written = f" after {self.n_bytes / 1e6:,.0f} MB" if self._files else ""
        return OSError(
            error.errno,
            f"The tokens of the cells cannot be written to {str(self.place)!r}{written} "
            f"({error.strerror or error}). They need 5 bytes a gene of each cell: free some space, or give another place "
            "with output_dir or scdlkit.settings.temp_dir.",
        )


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
