"""Embeddings on disk (see :mod:`.disk_cache`): no cell goes through the same encoder twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch

from scdlkit._settings import logger

from . import disk_cache
from ._processes import processes
from .stored_tokens import AnyTokens


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
    # of several processes, some might find what others would compute together
    if disk_cache.limit() == 0 or processes(device)[1] > 1:
        return compute()
    what = [checkpoint_sha256, precision, device.type, torch.__version__, *(tokens.fingerprint() for tokens in draws)]
    path = disk_cache.cache_path("embedding", what)
    found = disk_cache.find(path)
    if found is not None:
        with found:
            embedding: np.ndarray = np.load(found, allow_pickle=False)
        logger.debug("%d cells are taken from %s.", len(embedding), path)
        return embedding
    embedding = compute()
    content = io.BytesIO()
    np.save(content, embedding, allow_pickle=False)
    disk_cache.keep(content, path)
    return embedding
