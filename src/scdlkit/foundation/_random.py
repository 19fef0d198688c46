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
        torch.random.manual_seed(_one(seeds))
        yield


def default_generator(device: torch.device) -> torch.Generator:
    """The one that :func:`seeded` seeds, for what has to be drawn from where dropout draws."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def generator(*seeds: int) -> torch.Generator:
    """A generator of its own for several seeds, on the CPU."""
    return torch.Generator().manual_seed(_one(seeds))


def _one(seeds: tuple[int, ...]) -> int:
    return hash(seeds) & (2**63 - 1)  # one number from several, spread over 63 bits
