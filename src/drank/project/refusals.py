"""Refusals of the operating system that a user can mend: one message with the path, what is wrong and what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# By number: what is wrong, and what to do.
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "make space there"),
    errno.EDQUOT: ("the disk quota is used up", "make space there, or ask for more"),
    errno.EFBIG: ("larger than a file may be there", "raise the limit (ulimit -f), or use another file system"),
    errno.EACCES: ("permission denied", "let this user read and write there (ls -l, chmod, chown)"),
    errno.EPERM: ("not permitted", "let this user read and write there (ls -l, lsattr, chown)"),
    errno.EROFS: ("the file system is read-only", "mount it to be written, or work in another folder"),
    errno.EISDIR: ("a folder is where a file should be", "move it out of the way"),
    errno.ENOTDIR: ("a file is where a folder should be", "move it out of the way"),
    errno.EEXIST: ("a file is where a folder should be", "move it out of the way"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "work in a folder with a shorter path"),
    errno.ELOOP: ("symbolic links lead in a circle", "remove one of them"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.EIO: ("the disk fails to read or write", "look into the system's log, and use another disk"),
}
# SQLite has numbers of its own, and names no file.
SQLITE = "mlflow.db, or the database of MLFLOW_TRACKING_URI"
IN_WORDS = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
}


class FileError(ValueError):
    """A file is missing, damaged, cannot hold what it was given, or is refused by the system; the message names it."""


def refusal(error: BaseException, path: Path | None = None, needed: int | None = None) -> FileError | None:
    """The operating system's refusal as an error of the user: the path, what is wrong, what to do.

    Args:
        error: anything. Its causes are looked at too, since libraries wrap what the system says.
        path: what is named where the error names no file.
        needed: bytes that the file will have, where that is known.

    Returns:
        None where the system refused nothing, or nothing that is in ``REFUSALS``.
    """
    cause: BaseException | None = error
    while cause is not None:
        if (number := _errno(cause)) in REFUSALS:
            # The second of two names is the one that was to be written.
            named = getattr(cause, "filename2", None) or getattr(cause, "filename", None) or path
            return FileError(_refused(number, named, str(cause), needed))
        cause = cause.__cause__
    return None


def _errno(error: BaseException) -> int:
    """The system's number for what went wrong, 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text):  # in Rust, such as safetensors; in Python
        return int(found[1] or found[2])
    return next((number for words, number in IN_WORDS.items() if words in text), 0)


def _refused(number: int, named: str | bytes | int | Path | None, text: str, needed: int | None) -> str:
    wrong, fix = REFUSALS[number]
    if named is None or isinstance(named, int):
        where = SQLITE if any(words in text for words in IN_WORDS) else text.splitlines()[0]
        return f"{where}: {wrong}; {fix}, then run the same command again"
    # A file has a hidden name until it is whole; the user knows it by the name that it gets.
    shown = re.sub(r"(^|/)\.([^/]+)\.(partial|scratch)(?=/|$)", r"\1\2", os.fsdecode(named))
    if number in (errno.ENOSPC, errno.EDQUOT):
        wrong += f" ({_free(Path(shown)):,} bytes are left" + (f", {needed:,} are needed)" if needed else ")")
    return f"{shown}: {wrong}; {fix}, then run the same command again"


def _free(path: Path) -> int:
    """Bytes that this user may still write where the path is, or is to be."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free


def check_access(path: Path, mode: str = "rb") -> None:
    """Open and close a file, for libraries that call a folder or a forbidden file damaged, or try again for minutes.

    Raises:
        FileError: the system refuses to open it so.
        FileNotFoundError: there is none.
    """
    with refusals(path):
        path.open(mode).close()


@contextmanager
def refusals(path: Path, needed: int | None = None) -> Iterator[None]:
    """A refusal of the system in the block becomes an error of the user, which names the file or else ``path``.

    Raises:
        FileError: such a thing.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        if (told := refusal(error, path, needed)) is None:
            raise
        raise told from error
