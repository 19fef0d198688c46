"""Run a frozen encoder over tokens: one embedding per cell, in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scdlkit._settings import logger, settings

from ._cell_attention import Scratch
from ._device import embedding_precision, resolve_device
from ._overlap import on_host, prepared
from ._processes import processes, put_together
from .batching import MAX_BATCH_TOKENS, Batch, PackedBatch, collate, collate_packed, length_batches, packs
from .frozen import FrozenEncoder, can_freeze
from .frozen_cuda import HALVES, CUDAEncoder, can_run_packed
from .model import ScGPTEncoder, keys_to_keep
from .stored_tokens import AnyTokens

AnyBatch = TypeVar("AnyBatch", Batch, PackedBatch)

_PACK_TOKENS = 4096  # at a time, per thread, where cells stand one behind the other


def embed_tokens(
    encoder: ScGPTEncoder,
    tokens: AnyTokens,
    *,
    cls_id: int,
    pad_id: int,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    max_batch_tokens: int | None = None,
    precision: str | None = None,
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
        Token budget of a batch; by device by default.
    precision
        ``"fp32"``, ``"bf16"``, on a GPU ``"fp16"``, on a CPU ``"int8"``, or ``"auto"``: fp16 on a GPU, fp32 on a CPU.
        The setting by default.
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
    ValueError
        If the device lacks the precision.
    """
    device = resolve_device(device)
    encoder.check_token_ids(np.union1d(tokens.genes(), [cls_id, pad_id]))
    encoder.to(device).eval()
    how = embedding_precision(precision, device)
    embedding = np.zeros((tokens.n_cells, encoder.config.embsize), dtype=np.float32)
    occupied = np.flatnonzero(tokens.lengths)
    rank, count = processes(device)
    show = (settings.progress if progress is None else progress) and rank == 0
    run: Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]
    if device.type == "cpu" and can_freeze(encoder):
        run, cut, budget = _packed, packs, max_batch_tokens or _PACK_TOKENS
    elif can_run_packed(encoder, how):
        run, cut, budget = _packed_on_gpu, length_batches, max_batch_tokens or MAX_BATCH_TOKENS[device.type]
    else:
        run, cut, budget = _padded, length_batches, max_batch_tokens or MAX_BATCH_TOKENS[device.type]
    batches = cut(tokens.lengths[occupied], max_tokens=budget, max_cells=batch_size)
    own = [occupied[rows] for rows in batches[rank::count]]
    with tqdm(total=len(occupied), desc="Embedding", unit="cell", disable=not show, leave=False) as bar:
        for cells, output in run(encoder, tokens, own, cls_id=cls_id, pad_id=pad_id, device=device, precision=how):
            embedding[cells] = output
            bar.update(len(cells) * count)
    embedding = put_together(embedding, device)
    if how == "fp16" and len(beyond := np.flatnonzero(~np.isfinite(embedding).all(axis=1))):
        logger.warning("%d cells have states beyond float16 and are embedded in float32.", len(beyond))
        embedding[beyond] = embed_tokens(
            encoder, tokens[beyond], cls_id=cls_id, pad_id=pad_id, device=device, precision="fp32", progress=progress
        )
    return embedding


def _packed_on_gpu(
    encoder: ScGPTEncoder,
    tokens: AnyTokens,
    batches: list[np.ndarray],
    *,
    cls_id: int,
    device: torch.device,
    precision: str,
    **_: object,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch of cells with its embeddings, by :class:`CUDAEncoder`."""
    fast = CUDAEncoder(encoder, HALVES[precision])
    how = {"cls_id": cls_id, "pad_value": encoder.config.pad_value, "usual": int(tokens.lengths.max(initial=0))}
    ready = ((cells, collate_packed(tokens[cells].load(), **how, device=device)) for cells in batches)
    yield from _overlapped(ready, fast, device)


def _padded(
    encoder: ScGPTEncoder,
    tokens: AnyTokens,
    batches: Iterable[np.ndarray],
    *,
    cls_id: int,
    pad_id: int,
    device: torch.device,
    precision: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch of cells with its embeddings, by PyTorch on any device."""
    if precision == "int8":
        raise ValueError("precision='int8' needs an unchanged encoder on the CPU with finite weights; use 'fp32'.")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        tables = encoder.input_tables()
        ready = _collated(encoder, tokens, batches, cls_id=cls_id, pad_id=pad_id, device=device)
        yield from _overlapped(ready, lambda batch: encoder.cls(*batch, tables=tables).float(), device)


def _collated(
    encoder: ScGPTEncoder, tokens: AnyTokens, batches: Iterable[np.ndarray], *, device: torch.device, **ids: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    return (
        (cells, collate(tokens, cells, **ids, pad_value=encoder.config.pad_value, device=device)) for cells in batches
    )


def _overlapped(
    batches: Iterable[tuple[np.ndarray, AnyBatch]], compute: Callable[[AnyBatch], Tensor], device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cells with what is computed of their batch; the host makes the next one while a GPU computes."""
    with prepared(batches, device) as ready:
        yield from on_host((cells, compute(batch.to(device))) for cells, batch in ready)


def lower_states(
    encoder: ScGPTEncoder, tokens: AnyTokens, n_blocks: int, *, cls_id: int, pad_id: int, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the lowest blocks of a frozen encoder make of every token, in float32, as it is computed.

    Parameters
    ----------
    encoder
        Left on ``device``, in eval mode.
    tokens
        Cells.
    n_blocks
        How many blocks.
    cls_id, pad_id, device
        See :func:`embed_tokens`.

    Yields
    ------
    ndarray
        Positions of some cells; every cell once, in no particular order.
    ndarray
        float32 ``[tokens, embsize]``, these cells one behind the other, each with its ``<cls>`` first.
    """
    encoder.to(device).eval()
    if device.type == "cpu" and can_freeze(encoder):
        frozen = FrozenEncoder(encoder, n_blocks=n_blocks)
        batches = packs(tokens.lengths, max_tokens=_PACK_TOKENS)
        yield from _shared_out(
            frozen, batches, lambda cells, scratch: frozen.states(tokens[cells].load(), cls_id, scratch)[0]
        )
        return

    def compute(batch: Batch) -> Tensor:
        inputs = encoder.embed_inputs(batch.gene_ids, batch.values)
        x = encoder.encode(inputs, keys_to_keep(batch.padding_mask), stop=n_blocks)
        return x.flatten(0, 1) if batch.padding_mask is None else x[~batch.padding_mask]

    with torch.inference_mode():
        padded = length_batches(tokens.lengths, max_tokens=MAX_BATCH_TOKENS[device.type])
        ready = _collated(encoder, tokens, padded, cls_id=cls_id, pad_id=pad_id, device=device)
        yield from _overlapped(ready, compute, device)


def _packed(
    encoder: ScGPTEncoder, tokens: AnyTokens, batches: list[np.ndarray], *, cls_id: int, precision: str, **_: object
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch of cells with its embeddings, by :class:`FrozenEncoder`."""
    frozen = FrozenEncoder(encoder, precision)  # type: ignore[arg-type]
    return _shared_out(frozen, batches, lambda cells, scratch: frozen(tokens[cells].load(), cls_id, scratch))


def _shared_out(
    frozen: FrozenEncoder, batches: list[np.ndarray], compute: Callable[[np.ndarray, Scratch], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each batch with what is computed of it, as many batches at a time as PyTorch has threads, as they are done.

    Threads that each take a batch wait for each other less than threads that share every operation.
    """
    n_threads = min(torch.get_num_threads(), len(batches))
    free = [Scratch() for _ in range(n_threads)]

    def one(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scratch = free.pop()
        try:
            return cells, compute(cells, scratch)
        finally:
            free.append(scratch)

    if n_threads < 2:
        yield from map(one, batches)
        return
    with _one_thread_each(n_threads) as pool:
        waiting = iter(batches)
        running: set[Future[tuple[np.ndarray, np.ndarray]]] = set()
        while True:
            running |= {pool.submit(one, cells) for cells in islice(waiting, n_threads - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


@contextmanager
def _one_thread_each(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Workers in which PyTorch uses one thread."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # the workers' number would become that of new threads


def normalise(embedding: np.ndarray) -> np.ndarray:
    """L2-normalise rows; all-zero rows stay zero."""
    length = np.linalg.norm(embedding, axis=1, keepdims=True)
    return np.divide(embedding, length, out=np.zeros_like(embedding), where=length > 0)
