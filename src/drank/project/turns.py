"""Commands that must not overlap take turns: the second one waits until the first has ended, or was killed."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def turn(place: str, what: str) -> Iterator[None]:
    """Only one process of this machine and this user at a time is in a ``with`` block of this place.

    The lock is a file in the folder for temporary files, and the system's, so a killed process leaves none.

    Args:
        place: the absolute path, or the address, of what is used.
        what: what a process that has to wait says is at work.
    """
    user = getattr(os, "getuid", int)()
    name = hashlib.sha256(place.encode()).hexdigest()[:32]
    lock = FileLock(Path(tempfile.gettempdir()) / f"drank-{user}-{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting: %s is at work", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
