"""Rows of numbers in a temporary file: written as they come, read again in any part.

The file has no name (where the system allows it), so nothing is left of it when its last reader is gone, even if the
process is killed. It is read, not mapped: what the system caches of it then counts as cache and not as memory of the
process. Sequential, random or repeated, most reads are served by that cache.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike


class RowFile:
    """Rows of one type and width; gone with this object. Several threads may read.

    Parameters
    ----------
    place
        Folder for the file; made if need be.
    dtype
        Of a number.
    width
        Numbers in a row; a row is a number by itself by default.
    content
        What is in it, for errors: ``"tokens"``.
    needs
        What that takes, for errors: ``"5 bytes a gene of each cell"``.
    file
        Open file that has the rows already; by default a new one without any.

    Raises
    ------
    OSError
        If nothing can be written there.
    """

    def __init__(
        self,
        place: Path,
        dtype: DTypeLike,
        width: int | None = None,
        *,
        content: str,
        needs: str,
        file: BinaryIO | None = None,
    ) -> None:
        self.place, self.dtype = place, np.dtype(dtype)
        self._shape = () if width is None else (width,)
        self._content, self._needs = content, needs
        self._lock = threading.Lock()  # a read moves the position in the file
        try:
            if file is None:
                place.mkdir(parents=True, exist_ok=True)
                file = tempfile.TemporaryFile(dir=place, prefix="scdlkit-")
        except OSError as error:
            raise self._explained(error, 0) from error
        self.file = file
        weakref.finalize(self, file.close)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.dtype.itemsize * int(np.prod(self._shape))

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self.file.fileno()).st_size

    def append(self, rows: np.ndarray[Any, Any]) -> None:
        """Write further rows; an OSError says what to do if they do not fit on the disk."""
        with self._lock:
            self._write(rows, self.file.seek(0, os.SEEK_END))

    def write(self, rows: np.ndarray[Any, Any], starts: np.ndarray, lengths: np.ndarray) -> None:
        """Write stretches of rows, given one after another, to where they belong; errors as of :meth:`append`."""
        ends = np.cumsum(lengths)
        with self._lock:
            for start, first, end in zip(starts.tolist(), (ends - lengths).tolist(), ends.tolist(), strict=True):
                self.file.seek(start * self.row_bytes)
                self._write(rows[first:end], start * self.row_bytes)

    def _write(self, rows: np.ndarray[Any, Any], at: int) -> None:
        try:
            self.file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
            self.file.flush()
            if (written := self.n_bytes - at) < rows.size * self.dtype.itemsize:
                raise OSError(f"{written:,} of {rows.size * self.dtype.itemsize:,} bytes were written")
        except OSError as error:
            raise self._explained(error, at) from error

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray[Any, Any]:
        """Rows ``[sum(lengths), width]`` of stretches at ascending starts, one stretch after another.

        Raises
        ------
        OSError
            If the file is shorter than what was written.
        """
        result = np.empty((int(lengths.sum()), *self._shape), dtype=self.dtype)
        if not len(result):
            return result
        ends = starts + lengths
        first = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))  # of stretches that follow each other
        last = np.concatenate([first[1:], [len(starts)]]) - 1
        content, at = memoryview(result.reshape(-1).data).cast("B"), 0
        size = self.row_bytes
        stretches = list(zip((starts[first] * size).tolist(), (ends[last] * size).tolist(), strict=True))
        if hasattr(os, "posix_fadvise"):  # the disk fetches what is not in memory in any order, many at a time
            with suppress(OSError):  # a hint
                for start, end in stretches:
                    if end > start:  # else the rest of the file
                        os.posix_fadvise(self.file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
        with self._lock:
            for start, end in stretches:
                self.file.seek(start)
                if self.file.readinto(content[at : at + end - start]) != end - start:  # type: ignore[attr-defined]
                    raise OSError(f"The file of {self._content} in {self.place} was cut off; is the disk at fault?")
                at += end - start
        return result

    def _explained(self, error: OSError, n_bytes: int) -> OSError:
        written = f" after {n_bytes / 1e6:,.0f} MB" if n_bytes else ""
        return OSError(
            error.errno,
            f"The {self._content} of the cells cannot be written to {str(self.place)!r}{written} "
            f"({error.strerror or error}). They need {self._needs}: free some space, or give another place "
            "with output_dir or scdlkit.settings.temp_dir.",
        )
