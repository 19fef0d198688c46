"""How much memory a block of work took at its peak."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import TracebackType
from typing import Self

import psutil

_MB = 1024**2


class PeakMemory:
    """Measures the peak of memory while its block runs, above what was in use at the start.

    Host memory is the resident set of this process, sampled by a thread, so a peak shorter than ``interval`` may be
    missed. What the process has freed and still holds is given back to the system first, where that is possible (glibc);
    elsewhere it does not count. On CUDA devices the peak comes from PyTorch's allocator and is exact.

    Parameters
    ----------
    device
        A CUDA device is measured too.
    interval
        Seconds between samples.

    Example
    -------
    >>> with PeakMemory() as memory:
    ...     block = bytearray(50 * 1024**2)
    >>> memory.host_mb > 40
    True
    """

    def __init__(self, device: str = "cpu", *, interval: float = 0.01) -> None:
        self.host_mb = 0.0
        self.device_mb = 0.0
        self._cuda = device if device.startswith("cuda") else None
        self._interval = interval
        self._process = psutil.Process()
        self._stop = threading.Event()

    @property
    def mb(self) -> float:
        """The device's peak on a CUDA device, else the host's."""
        return self.host_mb if self._cuda is None else self.device_mb

    def __enter__(self) -> Self:
        if self._cuda is not None:
            torch = sys.modules["torch"]  # whoever computes on CUDA has imported it
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._device_start = torch.cuda.memory_allocated(self._cuda)
        _give_back()
        self._start = self._peak = self._process.memory_info().rss
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)
        self.host_mb = (self._peak - self._start) / _MB
        if self._cuda is not None:
            peak = sys.modules["torch"].cuda.max_memory_allocated(self._cuda)
            self.device_mb = (peak - self._device_start) / _MB

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _give_back() -> None:
    """Else what one training has freed would be used by the next, which would seem to need nothing."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
