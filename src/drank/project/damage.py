"""Every byte that dvc.lock speaks of, in the workspace and in DVC's cache, read again: what is not as recorded."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from drank.project.dvc import LockError, cache_folder, dvc_md5, entry, outs_by_path, read_listing, read_lock


@dataclass(frozen=True)
class Damage:
    """A file that is not as ``stage`` wrote it; ``recorded`` is its md5 then, None if it was not there then."""

    path: Path
    stage: str
    recorded: str | None
    found: str


def find_damage(root: Path, bar: Callable[[Iterable[str]], Iterable[str]] = iter) -> Iterator[Damage]:
    """Compare every out of dvc.lock, and its copy in DVC's cache, with its md5. An absent one is not damaged.

    Args:
        bar: shows the progress over paths, as tqdm does.

    Raises:
        LockError: no dvc.lock, or not one.
    """
    cache, read = cache_folder(root), _Reader()
    outs = outs_by_path(root)
    for path in bar(outs):
        yield from _in_workspace(root / path, outs[path], cache, read)
        for md5, stage in outs[path].items():
            listed = read_listing(cache, md5) or {}
            for cached in sorted({md5, *listed.values()}):
                if cache:
                    yield from read.compare(entry(cache, cached), stage, cached.removesuffix(".dir"))


def find_torn(root: Path) -> dict[Path, str]:
    """DVC's own notes that cannot be read, each with what is wrong: DVC writes them in place, so a kill can tear them.

    Without its lock file, ``dvc repro`` takes what it finds in its cache of runs, and writes the lock anew.
    """
    torn = {}
    lock, rwlock = root / "dvc.lock", root / ".dvc/tmp/rwlock"
    if lock.is_file():
        try:
            read_lock(lock)
        except LockError as error:
            torn[lock] = str(error)
    if rwlock.is_file():
        try:
            json.loads(rwlock.read_text(encoding="utf-8"))
        except ValueError as error:
            torn[rwlock] = f"{rwlock}: not JSON: {error}"
    return torn


def mend(damages: Iterable[Damage]) -> list[Path]:
    """Take the damaged files away, so that DVC restores them or makes them again; what was not recorded stays."""
    gone = [damage.path for damage in damages if damage.recorded]
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return gone


class _Reader:
    """Hashes of files, each read once where workspace and cache are links to one."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}

    def md5(self, path: Path) -> str:
        status = path.stat()
        inode = status.st_dev, status.st_ino
        if inode not in self._known:
            self._known[inode] = dvc_md5(path)
        return self._known[inode]

    def compare(self, path: Path, stage: str, recorded: str | None) -> Iterator[Damage]:
        if path.is_file() and (found := self.md5(path)) != recorded:
            yield Damage(path, stage, recorded, found)


def _in_workspace(path: Path, written: dict[str, str], cache: Path | None, read: _Reader) -> Iterator[Damage]:
    """An out, which is good if it is what any of its writers wrote, and otherwise compared with the last one's."""
    md5, stage = next(reversed(written.items()))
    listings = [listed for recorded in written if (listed := read_listing(cache, recorded)) is not None]
    if path.is_dir() and listings:
        found = {file: file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()}
        if not any({name: read.md5(file) for file, name in found.items()} == listed for listed in listings):
            for file, name in found.items():
                yield from read.compare(file, stage, listings[-1].get(name))
    elif path.exists() and (md5_now := dvc_md5(path)) not in written:
        yield Damage(path, stage, md5, md5_now)
