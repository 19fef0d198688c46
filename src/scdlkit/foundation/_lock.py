"""One process at a time, by the operating system's lock on a file: a dead process holds none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from scdlkit._settings import logger


@contextmanager
def exclusive(path: Path, doing: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``path`` inside the ``with`` block, waiting for whoever has it.

    Yields
    ------
    bool
        Whether the lock is held: False on a read-only disk, and on network file systems without locks.

    Raises
    ------
    BlockingIOError
        If somebody else has it and ``wait`` is False.
    """
    take, release = _lockers()
    try:
        file = path.open("a+b")
    except OSError as error:
        logger.debug("%s cannot be opened (%s).", path, error)
        file = None
    with file or nullcontext():
        held = file is not None and _take(file.fileno(), take, doing, wait=wait)
        try:
            yield held
        finally:
            if held and file is not None:
                release(file.fileno())


def _take(descriptor: int, take: Callable[[int], None], doing: str, *, wait: bool) -> bool:
    waiting = False
    while True:
        try:
            take(descriptor)
            return True
        except (BlockingIOError, PermissionError) as error:  # POSIX, Windows: somebody else has it
            if not wait:
                raise BlockingIOError(f"Another process is {doing}.") from error
            if not waiting:
                logger.info("Waiting for another process: %s.", doing)
            waiting = True
            time.sleep(0.1)
        except OSError as error:
            logger.debug("No lock for %s (%s).", doing, error)
            return False


def _lockers() -> tuple[Callable[[int], None], Callable[[int], None]]:
    """How to take, without waiting, and release a lock on an open file."""
    if sys.platform == "win32":
        import msvcrt  # locks one byte at the current position, which nobody moves

        return (
            lambda descriptor: msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1),
            lambda descriptor: msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1),
        )
    import fcntl

    return (
        lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
        lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_UN),
    )
