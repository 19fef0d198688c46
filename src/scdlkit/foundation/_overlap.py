"""Work of the host and of a GPU at the same time: batches prepared ahead, results fetched behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
_AHEAD = 2  # prepared items that wait
_BEHIND = 2  # results on their way to the host


@contextmanager
def prepared(items: Iterable[T], device: torch.device) -> Iterator[Iterable[T]]:
    """``items``, made by a thread of their own while a GPU computes; as they are on a CPU, which has no time to spare."""
    if device.type != "cuda":
        yield items
        return
    with closing(prefetch(items, _AHEAD)) as ready:
        yield ready


def prefetch(items: Iterable[T], ahead: int) -> Generator[T, None, None]:
    """Items in their order, up to ``ahead`` of them made by a worker thread before they are asked for.

    An exception of ``items`` is raised where its item would have come. The thread has ended when the iterator has, also
    if it is closed early.

    Parameters
    ----------
    items
        Is iterated in the worker thread alone, so what is local to a thread (grad mode, autocast) is not the caller's.
    ahead
        1 or more.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="scdlkit-prefetch") as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(ahead))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, source, end))
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(cancel_futures=True)


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Room on the host, in pinned memory if what it will hold is for a CUDA device."""
    if device is None or device.type != "cuda":
        return torch.empty(shape, dtype=dtype)
    with torch.cuda.device(device):  # a worker thread would pin for the first GPU
        return torch.empty(shape, dtype=dtype, pin_memory=True)


def host_copy(numbers: np.ndarray, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A copy of ``numbers`` in :func:`host_tensor`."""
    tensor = host_tensor(numbers.shape, dtype, device)
    tensor.numpy()[:] = numbers
    return tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """The value there; the host does not wait for a GPU to finish what it has still to do."""
    return value.to(device, non_blocking=device.type == "cuda")


def on_host(results: Iterable[tuple[T, Tensor]], behind: int = _BEHIND) -> Iterator[tuple[T, np.ndarray]]:
    """Results as arrays; those of a GPU are handed out ``behind`` further ones later, so that it need not wait.

    Parameters
    ----------
    results
        Something that goes with a result, and the result.
    behind
        How many results of a GPU may be on their way.
    """
    copying: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()
    for key, value in results:
        copying.append((key, *_copied(value)))
        if copying[0][2] is None or len(copying) > behind:
            yield _arrived(*copying.popleft())
    while copying:
        yield _arrived(*copying.popleft())


def _copied(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The value on the host, and what tells that it is there, None where it is already."""
    if value.device.type != "cuda":
        return value.cpu(), None
    host = value.to("cpu", non_blocking=True)  # into pinned memory
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(value.device))
    return host, there


def _arrived(key: T, host: Tensor, there: torch.cuda.Event | None) -> tuple[T, np.ndarray]:
    if there is not None:
        there.synchronize()
    return key, host.numpy()
