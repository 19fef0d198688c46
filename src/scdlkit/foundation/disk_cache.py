"""Files in the cache folder that are found again by what their content was computed from.

A file is named after a digest of all that its content depends on, so nothing in it can be out of date, and ends with a
digest of what precedes, so damage is noticed. Files are written under another name and renamed: processes that share
the folder see whole ones or none. When they exceed the limit, those that were used least recently go.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from scdlkit._settings import logger, settings

_FOLDER = "embeddings"
_ENDING, _UNFINISHED = ".cached", ".unfinished"
_ABANDONED = 3600  # seconds for which nobody wrote to an unfinished file: its process was killed
_DIGEST_BYTES = 32
_PIECE = 1 << 22


def limit() -> int:
    """Bytes that all files may take together: ``settings.cache_embeddings``."""
    return int(settings.cache_embeddings * 1e9)


def cache_path(kind: str, what: Sequence[str]) -> Path:
    """Name of the file for content of a kind that depends on ``what`` alone."""
    digest = hashlib.sha256(" ".join([kind, *what]).encode()).hexdigest()
    return settings.cache_dir / _FOLDER / f"{digest}{_ENDING}"


def find(path: Path) -> BinaryIO | None:
    """The file, at the start of its content; None if there is none. A damaged one is None, and a warning."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("The cached file %s cannot be read (%s); its content is computed again.", path, error)
        return None
    digest = hashlib.sha256()
    for piece in _pieces(file, os.fstat(file.fileno()).st_size - _DIGEST_BYTES):
        digest.update(piece)
    if file.read() == digest.digest():
        with suppress(OSError):  # another process may have removed it, or it is another user's
            os.utime(path)  # used just now
        file.seek(0)
        return file
    file.close()
    logger.warning("The cached file %s is damaged and is computed again.", path)
    return None


def keep(content: BinaryIO, path: Path) -> None:
    """Write what a file holds, and remove others if they are too many now; a warning where that fails."""
    content.seek(0, os.SEEK_END)
    size = content.tell()
    if size + _DIGEST_BYTES > limit():  # it would drive out all others, and go itself
        logger.info("%.0f MB are more than settings.cache_embeddings allows, and are not kept.", size / 1e6)
        return
    content.seek(0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(suffix=_UNFINISHED, dir=path.parent)
        try:
            digest = hashlib.sha256()
            with os.fdopen(handle, "wb") as file:
                for piece in _pieces(content, size):
                    digest.update(piece)
                    file.write(piece)
                file.write(digest.digest())
            os.replace(unfinished, path)
        except BaseException:  # an interrupt too
            Path(unfinished).unlink(missing_ok=True)
            raise
        _make_room(path.parent)
    except OSError as error:
        logger.warning("%.0f MB could not be kept in %s: %s.", size / 1e6, path.parent, error)


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        size -= len(piece)
        yield piece


def _make_room(folder: Path) -> None:
    """Remove the files that were not used for the longest time, until the rest fits; other processes may do the same."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
    files = []
    for path in folder.glob(f"*{_ENDING}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit():
            return
        path.unlink(missing_ok=True)
        total -= size
