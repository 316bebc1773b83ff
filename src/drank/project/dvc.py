"""DVC's records of the files that stages wrote, and whether they are still those.

Reads dvc.lock and DVC's cache, and runs nothing of DVC.
"""

import configparser
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from platformdirs import site_config_dir, user_config_dir
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationError
from ruamel.yaml.resolver import implicit_resolvers

Stages = dict[str, dict[str, Any]]
DEEPEST = 64  # a parameter may be a mapping of lists of mappings
# PyYAML's, ten times as fast where it was built with libyaml, with the rules of YAML 1.2, which DVC writes.
LOADER: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {"yaml_implicit_resolvers": {}})
for _versions, *_rule in implicit_resolvers:
    if (1, 2) in _versions:
        LOADER.add_implicit_resolver(*_rule)


class LockError(ValueError):
    """dvc.lock, params.yaml and the files they speak of are not one finished state."""


class ConfigurationError(ValueError):
    """DVC's configuration cannot be read, so that nobody can say where its cache is."""


class DamageError(ValueError):
    """A file is not what a stage wrote there; the message names it, its md5 and the recorded one."""


@dataclass(frozen=True)
class Damage:
    """A file that is not as ``stage`` wrote it.

    Attributes:
        recorded: its md5 then; None if it was not there.
        found: its md5 now; None if it is gone.
    """

    path: Path
    stage: str
    recorded: str | None
    found: str | None


class Inputs:
    """A project's files as a stage reads them: ``inputs / "data/sampling/test.safetensors"`` is a path, checked.

    DVC knows a file by its size and time of change, which a bit that flips on the disk leaves as they are. So the bytes
    are compared with the md5 in dvc.lock. Paths that the lock lacks are not compared: a stage that is run by hand needs
    no DVC. Spectrum and compression, which would spend more than a twentieth of their time on it, read without it;
    `drank check` and `drank audit` read covariances and spectra again.

    Raises:
        LockError: dvc.lock is not one.
        DamageError: the file is not the recorded one.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._cache = root, cache_folder(root)
        self._outs = outs_by_path(root) if (root / "dvc.lock").is_file() else {}

    def __truediv__(self, name: str) -> Path:
        path = self.root / name
        within = [out for out in self._outs if PurePosixPath(name).is_relative_to(out)]
        if not within or not path.exists():
            return path
        out = max(within, key=len)
        ways = [differing(self.root / out, md5, self._cache, stage, path) for md5, stage in self._outs[out].items()]
        if all(ways):
            first = ways[0][0]
            raise DamageError(
                f"{first.path}: damaged, or changed since {first.stage} wrote it: its md5 is {first.found or 'gone'}, "
                f"expected {first.recorded or 'no such file'}. `drank check --mend` takes away what is damaged, "
                f"DVC's cached copy too; `dvc repro` then makes it again"
            )
        return path


def _within(path: str) -> str:
    """A path that is read, compared and, by `drank check --mend`, removed."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("leads out of the project")
    return path


class _File(BaseModel):
    path: str
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}(\.dir)?$")]


class _Out(_File):
    path: Annotated[str, AfterValidator(_within)]


class _Row(BaseModel):
    deps: list[_File] = []
    outs: list[_Out] = []
    params: dict[str, dict[str, Any]] = {}


class _Lock(BaseModel):
    stages: Annotated[dict[str, _Row], Field(min_length=1)]


def read_lock(path: Path) -> Stages:
    """The stages of a dvc.lock.

    Raises:
        LockError: no lock, or not one.
    """
    try:
        return parse_lock(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise LockError(f"{path}: not found; run `dvc repro`, which writes it") from None


def parse_lock(text: str | bytes, where: str) -> Stages:
    """The stages of the text of a dvc.lock; ``where`` names it in errors.

    Raises:
        LockError: not a dvc.lock, or one without stages.
    """
    try:
        depth = 0  # libyaml's loader calls itself for what is nested, and ends the process where the stack does
        for event in yaml.parse(text, LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        document = yaml.load(text, LOADER)
        _Lock.model_validate(document, strict=True)
    except ValidationError as error:
        key, why = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise LockError(f"{where}: damaged or empty: {key}: {why}; run `dvc repro`, which writes it anew") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that is none
        raise LockError(f"{where}: not YAML: {error}; a merge conflict? `dvc repro` writes it anew") from None
    stages: Stages = document["stages"]
    return stages


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


def differing(path: Path, md5: str, cache: Path | None, stage: str, within: Path | None = None) -> list[Damage]:
    """Files at ``path`` that are not those of this md5; none if all are.

    Files of a folder are compared with the folder's list in DVC's cache, or the folder as a whole where the cache has
    no list.

    Args:
        stage: what wrote it, for the report.
        within: the part of a folder that is compared, where the folder has a list.
    """
    part, listed = within or path, members(cache, md5)
    if listed is None:
        return compared({path: md5}, [path], stage)
    recorded = {path / name: one for name, one in listed.items() if (path / name).is_relative_to(part)}
    return compared(recorded, [part] if part.is_file() else files_of(part), stage)


def compared(recorded: Mapping[Path, str], there: Iterable[Path], stage: str) -> list[Damage]:
    """The paths that are not there, not recorded, or there with another md5."""
    now = {path: dvc_md5(path) for path in there}
    names = sorted({path for path, _ in now.items() ^ recorded.items()})
    return [Damage(path, stage, recorded.get(path), now.get(path)) for path in names]


def dvc_md5(path: Path) -> str:
    """The hash that DVC writes in its lock: of a file's bytes, or of a folder's list of hashes and paths, sorted."""
    if path.is_dir():
        rows = [{"md5": dvc_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files_of(path)]
        return hashlib.md5(json.dumps(rows).encode(), usedforsecurity=False).hexdigest() + ".dir"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def files_of(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def cache_folder(root: Path) -> Path | None:
    """The folder of DVC's cache with an entry for every md5; None outside of a DVC repository."""
    if (dvc := dvc_folder(root)) is None:
        return None
    place, folder = setting(dvc, "dir") or (dvc, "cache")
    return place / Path(folder).expanduser() / "files/md5"


def dvc_folder(root: Path) -> Path | None:
    """The closest ``.dvc`` around a folder."""
    here = root.absolute()
    return next((place / ".dvc" for place in (here, *here.parents) if (place / ".dvc").is_dir()), None)


def setting(dvc: Path, key: str) -> tuple[Path, str] | None:
    """A setting of DVC's section ``cache``, and the folder of the file that has it; None where no file has.

    DVC's files are read here, from the system's to the one that git ignores, of which the last counts: its own reader
    takes .2 s to import.
    """
    system = os.getenv("DVC_SYSTEM_CONFIG_DIR") or site_config_dir("dvc", "iterative")
    user = os.getenv("DVC_GLOBAL_CONFIG_DIR") or user_config_dir("dvc", "iterative")
    found = None
    for file in (Path(system, "config"), Path(user, "config"), dvc / "config", dvc / "config.local"):
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            told = " ".join(str(error).split())
            raise ConfigurationError(f"{file}: DVC's configuration cannot be read: {told}; mend it") from None
        if value := settings.get("cache", key, fallback=""):
            found = file.parent, value
    return found


def entry(cache: Path, md5: str) -> Path:
    """Where the cache keeps the bytes of this md5; for a folder, ``<md5>.dir``, its list."""
    return cache / md5[:2] / md5[2:]


def members(cache: Path | None, md5: str) -> dict[str, str] | None:
    """The md5 of each file of a folder with this one, by its path; of a file its own, by the empty name.

    None for a folder without a whole list in the cache.
    """
    if not md5.endswith(".dir"):
        return {"": md5}
    if cache is None or not entry(cache, md5).is_file():
        return None
    content = entry(cache, md5).read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
        return None
    return {file["relpath"]: file["md5"] for file in json.loads(content)}
