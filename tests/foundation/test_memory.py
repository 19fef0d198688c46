from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import time

import numpy as np
import pytest

from scdlkit.foundation._memory import PeakMemory


def test_sees_a_block_that_is_gone_at_the_end() -> None:
    gc.collect()  # what earlier tests left must not go meanwhile
    with PeakMemory(interval=0.001) as memory:
        # of the system, because malloc may have as much left of what earlier tests freed
        block = np.frombuffer(mmap.mmap(-1, 120 * 1024**2), dtype=float)
        until = time.monotonic() + 20
        while memory._peak - memory._start <= 100 * 1024**2 and time.monotonic() < until:
            block += 1  # on a busy machine the thread that looks may have to wait for its turn
        del block
    assert 100 < memory.mb < 250
    assert memory.device_mb == 0


def test_nothing_used_and_errors_pass() -> None:
    memory = PeakMemory()
    with pytest.raises(KeyError), memory:
        raise KeyError("x")
    assert 0 <= memory.host_mb < 50


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc is not that of glibc"
)
def test_what_was_freed_before_counts_again() -> None:
    """Blocks small enough to be malloc's own, which holds on to them while something lies behind them."""

    def work() -> list[bytearray]:
        return [bytearray(60_000) for _ in range(2_000)]

    blocks = work()
    behind = bytearray(60_000)
    del blocks
    with PeakMemory(interval=0.001) as memory:
        blocks = work()
    assert memory.mb > 100 and len(behind) == len(blocks[0])
