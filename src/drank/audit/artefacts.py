"""Files as DVC knows them, by hash: in the workspace, in DVC's cache, or in git."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from drank.project.dvc import cache_folder, dvc_md5, entry, read_listing
from drank.project.git import file_at


class ArtefactError(ValueError):
    """A file is at hand and is not what its hash says."""


class AbsentError(ValueError):
    """A file is not at hand; the message says what would bring it."""


@dataclass(frozen=True)
class Store:
    """Where the bytes of a repository's artefacts may be.

    Attributes:
        present: DVC's hash of each path as the workspace's dvc.lock has it. Whatever lies there must have it.
        commit: the commit whose files are asked of git, for what DVC does not cache; None outside git.
    """

    root: Path
    present: Mapping[str, str]
    commit: str | None

    def locate(self, path: str, md5: str) -> "Artefact":
        """The bytes of this hash, compared with it.

        Raises:
            AbsentError: neither the workspace nor the cache nor git has them.
            ArtefactError: they are there and damaged.
        """
        here = self.root / path
        if here.exists():
            found = dvc_md5(here)
            if found == md5:
                return Artefact("workspace", {"": here} if here.is_file() else _files(here))
            if self.present.get(path) == md5:
                raise ArtefactError(
                    f"{path}: edited or damaged: its md5 is {found}, dvc.lock has {md5}; `dvc checkout`"
                )
        cached = self._from_cache(path, md5)
        if cached is not None:
            return cached
        if self.commit is not None:
            committed = file_at(self.root, self.commit, path)
            if committed is not None and _md5(committed) == md5:
                return Artefact("git", {}, committed)
        raise AbsentError(
            f"{path} of md5 {md5} is neither in the workspace nor in DVC's cache; `dvc pull` or `dvc repro`"
        )

    @cached_property
    def cache(self) -> Path:
        return cache_folder(self.root) or self.root / ".dvc/cache/files/md5"

    def _from_cache(self, path: str, md5: str) -> "Artefact | None":
        cached = entry(self.cache, md5)
        if not cached.is_file():
            return None
        if not md5.endswith(".dir"):
            return Artefact("cache", {"": self._checked(path, md5)})
        listed = read_listing(self.cache, md5)
        if listed is None:
            raise ArtefactError(f"{path}: its listing in DVC's cache is damaged: {cached}; delete it and `dvc repro`")
        if not all(entry(self.cache, member).is_file() for member in listed.values()):
            return None
        return Artefact("cache", {name: self._checked(path, member) for name, member in listed.items()})

    def _checked(self, path: str, md5: str) -> Path:
        cached = entry(self.cache, md5)
        found = dvc_md5(cached)
        if found != md5:
            raise ArtefactError(f"{path}: damaged in DVC's cache: {cached} has md5 {found}; delete it and `dvc repro`")
        return cached


@dataclass(frozen=True)
class Artefact:
    """Bytes that were compared with their hash.

    Attributes:
        origin: workspace, cache or git.
        files: of a folder, its files by relative path; of a file, itself under the empty name.
        content: of what only git has, the bytes.
    """

    origin: str
    files: Mapping[str, Path]
    content: bytes = b""

    def file(self, relative: str = "") -> Path:
        """A file of a folder, or the file itself.

        Raises:
            AbsentError: the folder has no such file.
        """
        if relative not in self.files:
            raise AbsentError(f"{relative or 'the file'} is not in this {self.origin} artefact")
        return self.files[relative]

    def read(self) -> bytes:
        return self.files[""].read_bytes() if self.files else self.content


def _files(folder: Path) -> dict[str, Path]:
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
