"""Files as DVC knows them, by hash: in the workspace, in DVC's cache, or in git."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from drank.project.dvc import dvc_md5, entry
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
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir"], cwd=self.root, capture_output=True, text=True
        )
        return (self.root / (done.stdout.strip() or ".dvc/cache")).resolve() / "files/md5"

    def _from_cache(self, path: str, md5: str) -> "Artefact | None":
        cached = entry(self.cache, md5)
        if not cached.is_file():
            return None
        if not md5.endswith(".dir"):
            return Artefact("cache", {"": self._checked(path, md5)})
        text = cached.read_bytes()
        if _md5(text) != md5.removesuffix(".dir"):
            raise ArtefactError(f"{path}: its listing in DVC's cache is damaged: {cached}; delete it and `dvc repro`")
        rows = json.loads(text)
        if not all(entry(self.cache, row["md5"]).is_file() for row in rows):
            return None
        return Artefact("cache", {row["relpath"]: self._checked(path, row["md5"]) for row in rows})

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
