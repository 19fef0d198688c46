"""Training steps that a GPU repeats by itself.

A step is some 900 kernels, for which a host may take longer to ask than a fast GPU takes to run them. What it asked for once
is recorded as a CUDA graph, which is started as one. A graph reads and writes where it did when it was recorded and has
shapes of its own, so batches are copied to its place, gradients stay where they are, and cells without padding are followed
by others that count nothing, up to one of a few sizes.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scdlkit._settings import logger

from ._overlap import host_copy, to_device
from ._packed import Packed
from .batching import AnyBatch, Batch

_SIZES = 32  # from one power of two to the next; also cells per cell that is added
_MOST = 200  # forms of batches, of which a graph takes a few MB

Step = Callable[[AnyBatch, Tensor, Tensor], Tensor]


class Unrecordable(Exception):
    """A step was left in the middle, since the host waits for the GPU within it. No step is recorded any more; repeat it."""


class _Graph(NamedTuple):
    replay: Callable[[], None]
    inputs: list[Tensor]  # which it reads
    loss: Tensor  # which it writes


class Recorder:
    """Runs steps, and records those that come again.

    Parameters
    ----------
    parameters
        That get gradients.
    longest
        Tokens that no cell has more of.
    device
        Where.
    """

    def __init__(self, parameters: Iterable[Tensor], *, longest: int, device: torch.device) -> None:
        self._longest, self._device = longest, device
        self._parameters = list(parameters)
        self._gradients: dict[Tensor, Tensor] = {}  # of parameters, where graphs leave them
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}
        self._places: dict[Hashable, Tensor] = {}  # of inputs, shared by all graphs
        self._pool: Any = None  # of the graphs' memory
        self._records = True

    def clear(self) -> None:
        """Set all gradients back, before a step."""
        if self._records:
            self._hold_gradients()
        for parameter in self._parameters:
            parameter.grad = self._gradients.get(parameter)
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))

    def run(
        self, step: Step, batch: AnyBatch, codes: np.ndarray, weights: np.ndarray, *, needs: float | None
    ) -> Tensor:
        """The loss of a batch on the host, after a step on it.

        Parameters
        ----------
        step
            The same at every call: of a batch, the codes of its cells (int64) and their weights in the loss (float32), all
            on the device, adds to the gradients of the parameters and returns the loss. It must read nothing else on the
            host that changes from call to call.
        batch, codes, weights
            Of the step.
        needs
            Bytes that it takes; None if it shall not be recorded.

        Raises
        ------
        Unrecordable
            If the step could not be tried; what it and earlier ones left in the gradients is to be set back.
        """
        if not self._records or needs is None:
            return self._once(step, batch, codes, weights)
        filled, sizes = _filled(batch, self._longest, self._device)
        n_cells = len(codes) + _n_cells(filled) - _n_cells(batch)
        key = (type(batch), *_form(filled, sizes), n_cells)
        if key not in self._seen and len(self._seen) >= _MOST:
            return self._once(step, batch, codes, weights)
        graph = self._graphs.get(key)
        added = (0, n_cells - len(codes))  # which weigh nothing
        ready = [*_tensors(filled), *self._on_host(np.pad(codes, added), np.pad(weights, added))]
        sizes = [*sizes, n_cells, n_cells]
        inputs = self._room_for(ready, sizes) if graph is None else graph.inputs
        for place, part in zip(inputs, ready, strict=True):
            place[: len(part)].copy_(part, non_blocking=True)
        if graph is not None:
            graph.replay()
            return graph.loss
        *own, on_codes, on_weights = inputs
        given = _with_tensors(filled, iter(own))

        def again() -> Tensor:
            return step(given, on_codes, on_weights)

        if key not in self._seen:  # what the step calls for the first time must be loaded before it can be recorded
            self._seen.add(key)
            return self._tried(again)
        return self._recorded(key, again, inputs, needs)

    @property
    def holds_memory(self) -> bool:
        """Whether there is something recorded, which :meth:`stop` would give back."""
        return bool(self._graphs)

    def stop(self) -> None:
        """Record nothing more and give back the memory."""
        self._records = False
        self._graphs.clear()
        self._places.clear()
        self._gradients.clear()
        self._pool = None

    def _once(self, step: Step, batch: AnyBatch, codes: np.ndarray, weights: np.ndarray) -> Tensor:
        return step(batch.to(self._device), *(to_device(part, self._device) for part in self._on_host(codes, weights)))

    def _on_host(self, codes: np.ndarray, weights: np.ndarray) -> tuple[Tensor, Tensor]:
        return host_copy(codes, torch.int64, self._device), host_copy(weights, torch.float32, self._device)

    def _tried(self, step: Callable[[], Tensor]) -> Tensor:
        """The first step of a form: where the host takes part in it, none can be recorded."""
        before, loss = _host_numbers(), None
        try:
            with _no_waiting():
                loss = step()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
        if loss is not None and torch.equal(before, _host_numbers()):
            return loss
        reason = "waits for the GPU" if loss is None else "draws random numbers"
        logger.info("Steps are not recorded as CUDA graphs: the host %s within them.", reason)
        self.stop()
        if loss is None:  # out of the handler, whose traceback holds on to the tensors
            raise Unrecordable
        return loss

    def _recorded(self, key: Hashable, step: Callable[[], Tensor], inputs: list[Tensor], needs: float) -> Tensor:
        """The loss of a step that is recorded first; just the loss where there is no room for a record."""
        self._hold_gradients()
        # asked before: an allocation that fails would spoil the record and what comes after
        if needs > available(self._device):
            logger.info("No further steps are recorded as CUDA graphs: the GPU has not enough memory.")
            self.stop()
            return step()
        try:
            self._pool, replay, loss = record(step, self._device, self._pool)
        except RuntimeError as error:
            error.add_note(
                "While the step was recorded as a CUDA graph; TrainingConfig(cuda_graphs=False) does without."
            )
            raise
        self._graphs[key] = _Graph(replay, inputs, loss)
        replay()
        return loss

    def _room_for(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Where inputs go; what is there and not filled is of another batch or the first of this one, never garbage."""
        found = []
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            kind = number, part.dtype, part.shape[1:]
            place = self._places.get(kind)
            if place is None or len(place) < size:
                room = 1 << (size - 1).bit_length()
                place = self._places[kind] = part[:1].to(self._device).repeat(room, *(1 for _ in part.shape[1:]))
            found.append(place[:size])
        return found

    def _hold_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                self._gradients.setdefault(parameter, parameter.grad)


def record(run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Any, Callable[[], None], Tensor]:
    """What ``run`` asks of the GPU, which does nothing yet.

    Returns the pool of its memory, to be used by the next graph as well, how it is started, and where its result will be.
    """
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream()),  # where a record that fails would not lead back
        _no_garbage_collection(),
    ):
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        stream = _stream(torch.cuda.current_device())
        # a thread that prepares batches may go on
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return pool, graph.replay, result


def available(device: torch.device) -> int:
    """Bytes that a GPU has free, or that PyTorch holds there and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing is thrown away meanwhile: the end of another graph would spoil the one that is recorded."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def _stream(index: int) -> torch.cuda.Stream:
    """One for all recordings on a GPU: cuBLAS keeps some memory for each."""
    return torch.cuda.Stream(index)


def _host_numbers() -> Tensor:
    """Where PyTorch's random numbers of the host stand, which a record would not draw again."""
    return torch.get_rng_state()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """An error where the host waits for a GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _filled(batch: AnyBatch, longest: int, device: torch.device) -> tuple[AnyBatch, list[int]]:
    """The batch with further cells behind those without padding, and the sizes that its tensors then need.

    The tokens of these cells are whatever is there: nothing comes of them.
    """
    if isinstance(batch, Batch) or not isinstance(batch.cells, Packed) or batch.cells.alike:
        return batch, [len(part) for part in _tensors(batch)]
    starts = batch.cells.starts.numpy()
    n_tokens, added = int(starts[-1]), -(-(len(starts) - 1) // _SIZES)
    unit = max(1, (1 << n_tokens.bit_length() - 1) // _SIZES)
    more = -(n_tokens + added) % unit + added
    # a few tokens each, at most as many as the longest cell has and one
    ends = np.concatenate([starts, n_tokens + np.arange(1, added + 1) * more // added])
    cells = Packed(host_copy(ends, torch.int32, device), longest + 1, alike=False)
    filled = batch._replace(cells=cells)
    return filled, [*(n_tokens + more for _ in _tensors(batch)[:-1]), len(ends)]


def _n_cells(batch: AnyBatch) -> int:
    if not isinstance(batch, Batch) and isinstance(batch.cells, Packed):
        return len(batch.cells.starts) - 1
    return len(batch[0])


def _form(batch: AnyBatch, sizes: list[int]) -> Iterator[Hashable]:
    """All that a graph is bound to."""
    yield from ((size, *part.shape[1:], part.dtype) for size, part in zip(sizes, _tensors(batch), strict=True))
    yield from (value for value in _flat(batch) if not isinstance(value, Tensor))


def _flat(value: Any) -> Iterator[Any]:
    """The parts of named tuples in named tuples."""
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _tensors(batch: AnyBatch) -> list[Tensor]:
    return [value for value in _flat(batch) if isinstance(value, Tensor)]


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, tuple):
        return type(value)(*(_with_tensors(part, tensors) for part in value))
    return next(tensors) if isinstance(value, Tensor) else value
