"""Run a frozen encoder over tokens: one embedding per cell, in the caller's order."""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm

from scdlkit._settings import settings

from ._device import resolve_device
from ._processes import processes, put_together
from .batching import MAX_BATCH_TOKENS, collate, length_batches
from .model import ScGPTEncoder
from .stored_tokens import AnyTokens


def embed_tokens(
    encoder: ScGPTEncoder,
    tokens: AnyTokens,
    *,
    cls_id: int,
    pad_id: int,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Cell embeddings of a frozen encoder.

    Where several processes were launched together, all must call this with the same cells: each computes a share, and
    all get the whole.

    Parameters
    ----------
    encoder
        Left on ``device``, in eval mode.
    tokens
        Cells.
    cls_id, pad_id
        Vocabulary ids of ``<cls>`` and ``<pad>``.
    device
        See :func:`resolve_device`; the setting by default.
    batch_size
        Most cells of a batch; bounded by the token budget alone by default.
    max_batch_tokens
        Token budget of a padded batch; by device by default.
    progress
        Show a progress bar; the setting by default.

    Returns
    -------
    ndarray
        float32 ``[cells, embsize]``, the output at ``<cls>``, not normalised. Cells without tokens are all zero,
        which no embedded cell can be after scGPT's final layer norm.

    Raises
    ------
    KeyError
        If the encoder holds no row for a gene token.
    """
    device = resolve_device(device)
    encoder.check_token_ids(np.union1d(tokens.genes(), [cls_id, pad_id]))
    encoder.to(device).eval()
    budget = max_batch_tokens or MAX_BATCH_TOKENS[device.type]
    embedding = np.zeros((tokens.n_cells, encoder.config.embsize), dtype=np.float32)
    occupied = np.flatnonzero(tokens.lengths)
    rank, count = processes(device)
    show = (settings.progress if progress is None else progress) and rank == 0
    with (
        torch.inference_mode(),
        tqdm(total=len(occupied), desc="Embedding", unit="cell", disable=not show, leave=False) as bar,
    ):
        tables = encoder.input_tables()
        batches = length_batches(tokens.lengths[occupied], max_tokens=budget, max_cells=batch_size)
        for rows in batches[rank::count]:
            cells = occupied[rows]
            batch = collate(tokens, cells, cls_id=cls_id, pad_id=pad_id, pad_value=encoder.config.pad_value).to(device)
            output = encoder.cls(batch.gene_ids, batch.values, batch.padding_mask, tables=tables)
            embedding[cells] = output.float().cpu().numpy()
            bar.update(len(cells) * count)
    return put_together(embedding, device)


def normalise(embedding: np.ndarray) -> np.ndarray:
    """L2-normalise rows; all-zero rows stay zero."""
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    return np.divide(embedding, length, out=np.zeros_like(embedding), where=length > 0)
