"""Embeddings on disk, found again by what they were computed from: no cell goes through the same encoder twice.

A file is named after a digest of tokens, checkpoint, precision and device, so nothing in it can be out of date, and
begins with a digest of the rest, so damage is noticed. Files are written under another name and renamed: processes that
share the folder see whole ones or none. When they exceed the limit, those that were used least recently go.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from scdlkit._settings import logger, settings

from ._processes import processes
from .stored_tokens import AnyTokens

_ENDING = ".embedding"
_DIGEST_BYTES = 32


def cached(
    compute: Callable[[], np.ndarray],
    draws: Sequence[AnyTokens],
    *,
    checkpoint_sha256: str,
    precision: str,
    device: torch.device,
) -> np.ndarray:
    """What ``compute`` returns for these tokens, from the cache where it holds it.

    Does nothing but ``compute`` while ``settings.cache_embeddings`` is 0, or where several processes share the work.

    Parameters
    ----------
    compute
        Computes the embedding float32 ``[cells, embsize]``.
    draws
        Tokens of the cells, one set a draw.
    checkpoint_sha256, precision, device
        What else the embedding depends on.
    """
    limit = int(settings.cache_embeddings * 1e9)
    if limit == 0 or processes(device)[1] > 1:  # some processes might find what others would compute together
        return compute()
    what = [checkpoint_sha256, precision, device.type, torch.__version__, *(tokens.fingerprint() for tokens in draws)]
    folder = settings.cache_dir / "embeddings"
    path = folder / f"{hashlib.sha256(' '.join(what).encode()).hexdigest()}{_ENDING}"
    found = _read(path, draws[0].n_cells)
    if found is not None:
        logger.debug("%d cells are taken from %s.", len(found), path)
        return found
    embedding = compute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, embedding)
        _make_room(folder, limit)
    except OSError as error:
        logger.warning("The embedding of %d cells could not be kept in %s: %s.", len(embedding), folder, error)
    return embedding


def _read(path: Path, n_cells: int) -> np.ndarray | None:
    try:
        content = path.read_bytes()
        os.utime(path)  # used just now
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("The cached embedding %s cannot be read (%s) and is computed again.", path, error)
        return None
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() == digest:
        embedding: np.ndarray = np.load(io.BytesIO(rest), allow_pickle=False)
        if len(embedding) == n_cells:
            return embedding
    logger.warning("The cached embedding %s is damaged and is computed again.", path)
    return None


def _write(path: Path, embedding: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, embedding, allow_pickle=False)
    rest = content.getvalue()
    handle, unfinished = tempfile.mkstemp(prefix=".", suffix=_ENDING, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(rest).digest())
            file.write(rest)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _make_room(folder: Path, limit: int) -> None:
    """Remove the files that were not used for the longest time, until the rest fits; other processes may do the same."""
    files = []
    for path in folder.glob(f"*{_ENDING}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size
