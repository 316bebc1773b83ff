"""Reads every byte that dvc.lock speaks of again, in the workspace and in DVC's cache, and tells what is damaged."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from drank.project import dvc
from drank.project.dvc import Damage, LockError
from drank.project.files import FileError, read_json


@dataclass
class Findings:
    """Findings of `drank check` on the outs of dvc.lock.

    Attributes:
        damages: files that are not as recorded.
        whole: outs whose every file was read, in the workspace or in DVC's cache.
        absent: outs of which some files are in neither, so that nothing can be said.
        uncached: outs without a copy of every file in DVC's cache.
    """

    damages: list[Damage] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    uncached: list[str] = field(default_factory=list)


def find_damage(root: Path, bar: Callable[[Iterable[str]], Iterable[str]] = iter) -> Findings:
    """Compare every out of dvc.lock, and its copy in DVC's cache, with its md5.

    Two stages have one path where dvc.yaml no longer has one of them: the out is good if it is what either wrote.

    Args:
        bar: shows the progress over paths, as tqdm does.

    Raises:
        LockError: no dvc.lock, or not one.
    """
    cache, outs, found = dvc.cache_folder(root), dvc.outs_by_path(root), Findings()
    damages: dict[Path, Damage] = {}  # outs may share a file of the cache
    for path in bar(outs):
        here, written = root / path, outs[path].items()
        ways = [dvc.differing(here, md5, cache, stage) for md5, stage in written] if here.exists() else []
        wrong = ways[-1] if ways and all(ways) else []
        whole, copied = bool(ways) and all(damage.found for damage in wrong), False
        for md5, stage in written:
            if cache is None:
                break
            listed = dvc.members(cache, md5)
            entries = {dvc.entry(cache, one): one.removesuffix(".dir") for one in (md5, *(listed or {}).values())}
            copies = dvc.compared(entries, filter(Path.is_file, entries), stage)
            copied = listed is not None and all(damage.found for damage in copies)
            wrong = wrong + copies
        damages |= {damage.path: damage for damage in wrong if damage.found}
        (found.whole if whole or copied else found.absent).append(path)
        if not copied:
            found.uncached.append(path)
    found.damages = list(damages.values())
    return found


def find_torn(root: Path) -> dict[Path, str]:
    """DVC's own notes that cannot be read, each with what is wrong: DVC writes them in place, so a kill can tear them.

    Without its lock file, ``dvc repro`` takes what it finds in its cache of runs, and writes the lock anew.
    """
    torn = {}
    for path, read in ((root / "dvc.lock", dvc.read_lock), (root / ".dvc/tmp/rwlock", read_json)):
        if path.is_file():
            try:
                read(path)
            except (LockError, FileError) as error:
                torn[path] = str(error)
    return torn


def mend(damages: Iterable[Damage]) -> list[Path]:
    """Take damaged files away, so that DVC restores them or makes them again; files that were not recorded stay."""
    gone = [damage.path for damage in damages if damage.recorded]
    for path in gone:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return gone
