"""Commands that must not overlap take turns: the second one waits until the first has ended, or was killed."""

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def turn(place: str, what: str) -> Iterator[None]:
    """Only one process of this machine and this user at a time is in a ``with`` block of this place.

    The lock is a file in the folder for temporary files, and the system's, so a killed process leaves none.

    Args:
        place: the absolute path, or the address, of what is used.
        what: what a process that has to wait says is at work.
    """
    name = f"drank-{os.getuid()}-{hashlib.sha256(place.encode()).hexdigest()[:32]}.lock"
    lock = os.open(Path(tempfile.gettempdir(), name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting: %s is at work", what)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child of this process may have it open yet
        os.close(lock)
