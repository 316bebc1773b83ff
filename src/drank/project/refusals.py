"""Refusals of the operating system that a user can mend: one message with the path, what is wrong and what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS = "let this user read and write there (ls -l, chmod, chown)"
# By number: what is wrong, and what to do.
REFUSALS = {
    errno.ENOSPC: ("the disk is full", "make space there"),
    errno.EDQUOT: ("the disk quota is used up", "make space there, or ask for more"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), ("permission denied", ACCESS)),
    errno.EROFS: ("the file system is read-only", "mount it to be written, or work in another folder"),
    errno.EISDIR: ("a folder is where a file should be", "move it out of the way"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), ("a file is where a folder should be", "move it out of the way")),
    errno.EIO: ("the disk fails to read or write", "look into the system's log, and use another disk"),
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# SQLite has numbers of its own, and names no file.
SQLITE = "mlflow.db, or the database of MLFLOW_TRACKING_URI"
IN_WORDS = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
}


class FileError(ValueError):
    """A file is missing, damaged, cannot hold what it was given, or is refused by the system; the message names it."""


def refusal(error: BaseException | None, path: Path | None = None) -> FileError | None:
    """A refusal of the operating system as an error of the user: the path, what is wrong, what to do.

    Args:
        error: anything. Its causes are looked at too, since libraries wrap what the system says.
        path: what is named where the error names no file.

    Returns:
        None where the system refused nothing, or nothing that is in ``REFUSALS``.
    """
    if error is None:
        return None
    text = str(error)
    # The system's number, as Rust (safetensors) and Python write it, or the words of SQLite.
    said = re.search(r"(?:\(os error |\[Errno )(\d+)[])]", text)
    number = int(said[1]) if said else next((code for words, code in IN_WORDS.items() if words in text), 0)
    if number not in REFUSALS:
        return refusal(error.__cause__, path)
    wrong, fix = REFUSALS[number]
    # The second of two names is the one that was to be written; a number is a file that was open.
    named = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
    if named is None or isinstance(named, int):
        shown = text.splitlines()[0] if said else SQLITE
    else:
        # A file has a hidden name until it is whole; the user knows it by its later name.
        shown = re.sub(r"(^|/)\.([^/]+)\.(partial|scratch)(?=/|$)", r"\1\2", os.fsdecode(named))
        if number in (errno.ENOSPC, errno.EDQUOT):
            folder = next(parent for parent in Path(shown).absolute().parents if parent.is_dir())
            wrong += f" ({shutil.disk_usage(folder).free:,} bytes are left)"
    return FileError(f"{shown}: {wrong}; {fix}, then run the same command again")


def check_access(path: Path, mode: str = "rb") -> None:
    """Open and close a file, for libraries that call a folder or a forbidden file damaged, or try again for minutes.

    Raises:
        FileError: the system refuses to open it so, or it is a pointer of Git LFS.
        FileNotFoundError: there is none.
    """
    with refusals(path), path.open(mode) as stream:
        if stream.readable() and stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise FileError(f"{path}: a pointer of Git LFS in the place of the file; `git lfs pull` fetches it")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Refusals of the system in the block become errors of the user, each of which names the file or else ``path``.

    Raises:
        FileError: such a thing.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileError) or (told := refusal(error, path)) is None:
            raise
        raise told from error
