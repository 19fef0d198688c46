"""Randomness that PyTorch draws from its global generator (dropout, some initialisations), made local."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(*seeds: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed PyTorch's generators inside the block alone; the state outside is as it was before."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # one number from several, spread over 63 bits
        torch.random.manual_seed(hash(seeds) & (2**63 - 1))
        yield
