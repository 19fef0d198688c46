from __future__ import annotations

import numpy as np
import torch
from threadpoolctl import threadpool_info

from scdlkit.foundation.strategies._threads import few_threads


def threads() -> dict[str, int]:
    return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}


def test_small_work_has_one_thread_and_leaves_no_trace() -> None:
    np.ones((3, 3)) @ np.ones((3, 3))
    before, of_torch = threads(), torch.get_num_threads()
    with few_threads(1000):
        assert set(threads().values()) == {1}
        assert torch.get_num_threads() == 1
    assert threads() == before
    assert torch.get_num_threads() == of_torch
    with few_threads(10**9):
        assert threads() == before
