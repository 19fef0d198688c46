"""How many threads work on small matrices."""

from __future__ import annotations

from contextlib import AbstractContextManager

_ONE_THREAD = 20_000_000  # entries of a matrix up to which one thread was faster than many


def few_threads(n_entries: int = 0) -> AbstractContextManager[object]:
    """One thread for BLAS and OpenMP inside the block, if it works on matrices of few entries.

    Solvers and small networks call them thousands of times on little data. Threads that wait for each other then cost
    many times the work itself, the more so on a busy machine; and with one thread rounding is the same everywhere.

    Parameters
    ----------
    n_entries
        Entries of the largest matrix.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1 if n_entries <= _ONE_THREAD else None)
