"""Batches prepared ahead and results fetched behind come in order, complete, and leave no thread."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import _overlap
from scdlkit.foundation._overlap import on_host, prefetch, prepared

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("scdlkit-prefetch")]


def broken_after(n: int):
    yield from range(n)
    raise OSError("the disk is gone")


def wait_for(condition) -> bool:
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    return condition()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 12), ahead=st.integers(1, 5), taken=st.integers(0, 15), broken=st.booleans())
def test_the_same_items_and_the_same_error_in_the_same_place(n, ahead, taken, broken):
    ready = prefetch(broken_after(n) if broken else range(n), ahead)
    found = []
    try:
        for item in ready:
            found.append(item)
            if len(found) == taken:
                break
    except OSError as error:
        assert broken and str(error) == "the disk is gone" and len(found) == n
    else:
        assert not broken or 0 < taken <= n
    assert found == list(range(min(n, taken) if taken else n))
    ready.close()
    assert not workers()


def test_as_many_items_ahead_as_asked_for():
    made = []
    ready = prefetch((made.append(i) or i for i in range(10)), 3)
    assert made == []
    assert next(ready) == 0 and wait_for(lambda: len(made) == 4)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    assert next(ready) == 1 and wait_for(lambda: len(made) == 5)
    ready.close()


def test_a_thread_for_a_gpu_alone_that_ends_with_an_error_of_the_caller():
    def names():
        while True:
            yield threading.current_thread().name

    with prepared(names(), CPU) as ready:
        assert next(iter(ready)) == threading.current_thread().name
    with pytest.raises(ZeroDivisionError), prepared(names(), CUDA) as ready:
        assert next(iter(ready)).startswith("scdlkit-prefetch")
        assert len(workers()) == 1
        raise ZeroDivisionError
    assert not workers()


def test_results_on_the_cpu_come_at_once():
    asked = []
    results = on_host((asked.append(i) or i, torch.full((2,), float(i))) for i in range(3))
    for i in range(3):
        key, value = next(results)
        assert asked == list(range(i + 1))
        assert (key, value.tolist()) == (i, [i, i]) and isinstance(value, np.ndarray)
    assert next(results, None) is None


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 8), behind=st.integers(0, 4))
def test_results_of_a_gpu_come_in_order_and_when_they_are_there(n, behind):
    """The host's side of it: a device that fills a result only when it is waited for."""
    asked = []

    class Copy:
        def __init__(self, value: torch.Tensor) -> None:
            self.value, self.host = value, torch.full_like(value, torch.nan)

        def synchronize(self) -> None:
            self.host.copy_(self.value)

    def copied(value):
        copy = Copy(value)
        return copy.host, copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_overlap, "_copied", copied)
        found = []
        for key, value in on_host(((asked.append(i) or i, torch.tensor([float(i)])) for i in range(n)), behind):
            found.append((key, value.item()))
            assert len(asked) == min(n, len(found) + behind)
    assert found == [(i, float(i)) for i in range(n)]
