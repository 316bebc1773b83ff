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
        what: name of the present holder, shown to whoever waits.
    """
    name = f"drank-{os.getuid()}-{hashlib.sha256(place.encode()).hexdigest()[:32]}.lock"
    lock = FileLock(Path(tempfile.gettempdir(), name), mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting: %s is at work", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
