"""Files as DVC knows them, by hash: in the workspace, in DVC's cache, or in git."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drank.audit.ledger import BrokenLinkError, UncheckableError
from drank.project.dvc import cache_folder, compared, dvc_md5, entry, files_of, members
from drank.project.git import file_at


@dataclass(frozen=True)
class Artefact:
    """Bytes that were compared with their hash.

    Attributes:
        origin: workspace, cache or git.
        files: the files of a folder by relative path; a file itself under the empty name.
        content: the bytes, where only git has them.
    """

    origin: str
    files: Mapping[str, Path]
    content: bytes = b""

    def file(self, relative: str) -> Path:
        if relative not in self.files:
            raise UncheckableError(f"{relative} is not in this {self.origin} artefact")
        return self.files[relative]

    def read(self) -> bytes:
        return self.files[""].read_bytes() if self.files else self.content


def locate(root: Path, path: str, md5: str, present: Mapping[str, str], commit: str | None) -> Artefact:
    """The bytes of an artefact that have this hash, compared with it.

    Args:
        present: DVC's hash of each path as the workspace's dvc.lock has it. Whatever lies there must have it.
        commit: the commit that git is asked for files that DVC does not cache; None outside git.

    Raises:
        UncheckableError: neither the workspace nor the cache nor git has them.
        BrokenLinkError: they are there and damaged.
    """
    here = root / path
    if here.exists():
        if (found := dvc_md5(here)) == md5:
            files = {file.relative_to(here).as_posix(): file for file in files_of(here)}
            return Artefact("workspace", files or {"": here})
        if present.get(path) == md5:
            raise BrokenLinkError(f"{path}: edited or damaged: its md5 is {found}, dvc.lock has {md5}; `dvc checkout`")
    if files := _cached(root, path, md5):
        return Artefact("cache", files)
    committed = file_at(root, commit, path) if commit else None
    if committed is not None and hashlib.md5(committed, usedforsecurity=False).hexdigest() == md5:
        return Artefact("git", {}, committed)
    raise UncheckableError(f"{path} of md5 {md5} is not here, nor in DVC's cache; `dvc pull` or `dvc repro`")


def _cached(root: Path, path: str, md5: str) -> dict[str, Path]:
    """The cache's files, each compared with its md5; empty unless all are there."""
    cache = cache_folder(root)
    if cache is None or not entry(cache, md5).is_file():
        return {}
    if (listed := members(cache, md5)) is None:
        raise BrokenLinkError(f"{path}: damaged in DVC's cache: {entry(cache, md5)}; delete it and `dvc repro`")
    files = {name: entry(cache, one) for name, one in listed.items()}
    if not all(file.is_file() for file in files.values()):
        return {}
    if damages := compared({files[name]: one for name, one in listed.items()}, files.values(), ""):
        raise BrokenLinkError(f"{path}: damaged in DVC's cache: {damages[0].path}; delete it and `dvc repro`")
    return files
