"""DVC's records of the files that stages wrote, and whether they are still those.

Reads dvc.lock and DVC's cache, and runs nothing of DVC.
"""

import configparser
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import yaml
from platformdirs import site_config_dir, user_config_dir
from ruamel.yaml.resolver import implicit_resolvers

Stages = dict[str, dict[str, Any]]
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
DEEPEST = 64  # a parameter may be a mapping of lists of mappings
# PyYAML's, ten times as fast where it was built with libyaml, with the rules of YAML 1.2, which DVC writes.
LOADER: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {"yaml_implicit_resolvers": {}})
for _versions, *_rule in implicit_resolvers:
    if (1, 2) in _versions:
        LOADER.add_implicit_resolver(*_rule)


class LockError(ValueError):
    """dvc.lock, params.yaml and the files they speak of are not one finished state."""


class DamageError(ValueError):
    """A file is not what a stage wrote there; the message names it, its md5 and the recorded one."""


class Inputs:
    """A project's files as a stage reads them: ``inputs / "data/sampling/test.safetensors"`` is a path, checked.

    DVC knows a file by its size and time of change, and an entry of its cache by being read-only. A bit that flips on
    the disk changes neither, and the stage that reads it would make a wrong result under the name of the right one.
    So the bytes are compared with the md5 in dvc.lock; of a file within a folder that a stage wrote, with the folder's
    list in DVC's cache, or the whole folder is, where there is none. Paths that the lock lacks are not compared:
    a stage that is run by hand needs no DVC. Stages that would spend more than a twentieth of their time on it,
    spectrum and compression, read without it; `drank check` and `drank audit` read covariances and spectra again.

    Raises:
        LockError: dvc.lock is not one.
        DamageError: the file is not the recorded one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._cache = cache_folder(root)
        self._known: dict[Path, str] = {}
        self._listings: dict[str, dict[str, str] | None] = {}
        self._outs = outs_by_path(root) if (root / "dvc.lock").is_file() else {}

    def __truediv__(self, name: str) -> Path:
        path = self.root / name
        within = [out for out in self._outs if PurePosixPath(name).is_relative_to(out)]
        if within and path.exists():
            self._check(name, max(within, key=len))
        return path

    def sha256(self, name: str) -> str:
        """SHA-256 of a checked file; one pass over its bytes gives this hash and the md5 that is compared."""
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with (self.root / name).open("rb") as stream:
            while part := stream.read(2**18):
                md5.update(part)
                sha256.update(part)
        self._known[self.root / name] = md5.hexdigest()
        self / name
        return sha256.hexdigest()

    def _check(self, name: str, out: str) -> None:
        recorded = self._listed(name, out)
        path = self.root / (out if recorded is None else name)
        recorded = recorded or self._outs[out]
        found = dvc_md5(path, self._known)
        if found not in recorded:
            md5, stage = next(iter(recorded.items()))
            raise DamageError(
                f"{self._differing(path, md5)}: damaged, or changed since {stage} wrote it: the md5 of {path} is "
                f"{found}, dvc.lock has {md5}. `drank check --mend` takes away what is damaged, DVC's cached copy too; "
                f"`dvc repro` then makes it again"
            )

    def _listed(self, name: str, out: str) -> dict[str, str] | None:
        """The stages that wrote this path, by its md5; None where only those of the folder around it are known."""
        if name == out:
            return self._outs[out]
        if (self.root / name).is_dir():
            return None
        relative = PurePosixPath(name).relative_to(out).as_posix()
        rows = {}
        for md5, stage in self._outs[out].items():
            listed = self._listing(md5)
            if listed is None:
                return None
            rows[listed.get(relative, "no such file")] = stage
        return rows

    def _differing(self, path: Path, md5: str) -> Path:
        """The first file of a folder that is not as in its list; the path itself where that cannot be told."""
        listed = self._listing(md5) if path.is_dir() else None
        found = {file["relpath"]: file["md5"] for file in listing(path)} if listed else {}
        names = {name for name, _ in (listed or {}).items() ^ found.items()}
        return path / min(names, default="")

    def _listing(self, md5: str) -> dict[str, str] | None:
        if md5 not in self._listings:
            self._listings[md5] = read_listing(self._cache, md5)
        return self._listings[md5]


def read_lock(path: Path) -> Stages:
    """The stages of a dvc.lock.

    Raises:
        LockError: no lock, or not one.
    """
    try:
        return parse_lock(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise LockError(f"{path}: not found; run `dvc repro`, which writes it") from None
    except UnicodeDecodeError as error:
        raise LockError(f"{path}: damaged, {error}; `git checkout {path.name}` or `dvc repro` mends it") from None


def parse_lock(text: str, where: str) -> Stages:
    """The stages of a dvc.lock, given as text; ``where`` names it in errors.

    Raises:
        LockError: not a dvc.lock, or one without stages.
    """
    try:
        _check_depth(text)
        document = yaml.load(text, LOADER)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that is none
        raise LockError(f"{where}: not YAML: {error}; a merge conflict? `dvc repro` writes it anew") from None
    if not isinstance(document, dict) or not document.get("stages"):
        raise LockError(f"{where}: holds no stages; run `dvc repro`")
    stages: Stages = document["stages"]
    try:
        files = [file for row in stages.values() for file in (*row.get("deps", ()), *row.get("outs", ()))]
        outs = [PurePosixPath(out["path"]) for row in stages.values() for out in row.get("outs", ())]
        complete = all(isinstance(file["path"], str) and MD5.fullmatch(file["md5"]) for file in files)
        params = [sections for row in stages.values() for sections in row.get("params", {}).values()]
        complete = complete and all(isinstance(sections, dict) for sections in params)
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise LockError(f"{where}: damaged: a stage's files lack path or md5, or its params names; run `dvc repro`")
    for out in outs:  # what is read, compared and, by `drank check --mend`, removed
        if out.is_absolute() or ".." in out.parts:
            raise LockError(f"{where}: damaged: out {out} leads out of the project; `dvc repro` writes it anew")
    return stages


def _check_depth(text: str) -> None:
    """libyaml's loader calls itself for what is nested, and ends the process where the stack does."""
    depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")


def outs_by_path(root: Path) -> dict[str, dict[str, str]]:
    """For every path below ``root`` that a stage of dvc.lock wrote, the stage by the md5 of what it wrote.

    Two stages have one path where dvc.yaml no longer has one of them.

    Raises:
        LockError: no lock, or not one.
    """
    outs: dict[str, dict[str, str]] = {}
    prefix = f"{root.as_posix()}/"  # of paths in study/dvc.lock, whose stages run in the folder above
    for stage, row in read_lock(root / "dvc.lock").items():
        for out in row.get("outs", ()):
            outs.setdefault(out["path"].removeprefix(prefix), {})[out["md5"]] = stage
    return outs


def dvc_md5(path: Path, known: Mapping[Path, str] = MappingProxyType({})) -> str:
    """The hash that DVC writes in its lock: of a file's bytes, or of a folder's list of hashes and paths.

    Files whose md5 is ``known`` are not read.
    """
    if path.is_dir():
        return hashlib.md5(json.dumps(listing(path, known)).encode(), usedforsecurity=False).hexdigest() + ".dir"
    if path in known:
        return known[path]
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def listing(folder: Path, known: Mapping[Path, str] = MappingProxyType({})) -> list[dict[str, str]]:
    """A folder as DVC's cache lists it: every file's md5 and path, sorted."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [{"md5": dvc_md5(file, known), "relpath": file.relative_to(folder).as_posix()} for file in files]


def cache_folder(root: Path) -> Path | None:
    """The folder of DVC's cache with an entry for every md5; None outside of a DVC repository.

    DVC's files are read here, from the system's to the one that git ignores: its own reader takes .2 s to import.
    """
    here = root.absolute()
    dvc = next((place / ".dvc" for place in (here, *here.parents) if (place / ".dvc").is_dir()), None)
    if dvc is None:
        return None
    system = os.getenv("DVC_SYSTEM_CONFIG_DIR") or site_config_dir("dvc", "iterative")
    user = os.getenv("DVC_GLOBAL_CONFIG_DIR") or user_config_dir("dvc", "iterative")
    cache = dvc / "cache"
    for file in (Path(system, "config"), Path(user, "config"), dvc / "config", dvc / "config.local"):
        settings = configparser.ConfigParser(interpolation=None)
        settings.read(file, encoding="utf-8")
        cache = file.parent / Path(settings.get("cache", "dir", fallback=cache)).expanduser()
    return cache / "files/md5"


def entry(cache: Path, md5: str) -> Path:
    """Where the cache keeps the bytes of this md5; of a folder, ``<md5>.dir``, its list."""
    return cache / md5[:2] / md5[2:]


def read_listing(cache: Path | None, md5: str) -> dict[str, str] | None:
    """Every file's md5 by its path, of a folder with this one; None of a file, or where the cache has no whole list."""
    if cache is None or not md5.endswith(".dir") or not entry(cache, md5).is_file():
        return None
    content = entry(cache, md5).read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
        return None
    return {file["relpath"]: file["md5"] for file in json.loads(content)}
