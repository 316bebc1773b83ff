"""The surroundings of the project: its sources, git, and MLflow's store."""

import os
import shutil
import sqlite3
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from drank.preflight.facts import Facts, Finding, Level, cached_snapshot, offline
from drank.project.dvc import cache_folder
from drank.project.files import FileError
from drank.project.git import GitError, head, run
from drank.project.models import check_folder
from drank.project.refusals import ACCESS, LFS_POINTER
from drank.project.sources import SourceError
from drank.project.texts import check_beginning
from drank.tracking.store import is_database, sqlite_file, uri_of

PATIENCE = 1.0  # seconds for a server's answer
KEPT = ("params.yaml", "dvc.yaml", "dvc.lock", "results/a.json", "data/allocation/a.json")  # by git


def sources(facts: Facts) -> Iterator[Finding]:
    """Local paths that are not there or hold pointers of Git LFS; what the network is needed for."""
    if facts.fetched == facts.sources:
        return
    for section, source in facts.sources.items():
        key, (scheme, _, name) = f"{section}.source", source.partition(":")
        path = facts.root / Path(name).expanduser()
        if scheme == "local" and not path.exists():
            yield Finding(
                "error", f"{key} = '{source}': {path} is not there; a relative path starts at the folder of params.yaml"
            )
        elif scheme == "local" and (pointer := lfs_pointer(path)):
            yield Finding("error", f"{key} = '{source}': {pointer} is a pointer of Git LFS; `git lfs pull` there first")
        elif scheme == "local" and section != "model":
            yield from refused(key, source, check_beginning, facts.params.text[section.partition(".")[2]], facts.root)
        elif scheme == "local" and path.is_dir():
            yield from refused(key, source, check_folder, source, path)
        elif scheme == "hub":
            kind = "models" if section == "model" else "datasets"
            snapshot = cached_snapshot(kind, name)
            if snapshot is not None and section == "model":
                yield from refused(key, source, check_folder, source, snapshot)
            if snapshot is None:
                level: Level = "error" if offline() else "remark"
                fix = "HF_HUB_OFFLINE is set: unset it" if offline() else "the hub will be asked for it"
                yield Finding(level, f"{key} = '{source}' is not in the cache of the hub; {fix}")
        elif scheme == "pypi":
            wheel = name.partition("==")[0].replace("-", "_").lower() + "-"
            if not any(file.name.lower().startswith(wheel) for file in facts.root.glob("data/downloads/*.whl")):
                yield Finding("remark", f"{key} = '{source}': pip will fetch it, from its cache or over the network")


def refused(key: str, source: str, check: Callable[..., None], *arguments: Any) -> Iterator[Finding]:
    """The words in which a stage would refuse a source."""
    try:
        check(*arguments)
    except (SourceError, FileError) as error:
        yield Finding("error", f"{key} = '{source}': {str(error).removeprefix(f'{source}: ')}")


def lfs_pointer(path: Path) -> Path | None:
    """The first file at ``path`` that Git LFS left a pointer of."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and begins(file, LFS_POINTER):
            return file
    return None


def begins(file: Path, content: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(content)) == content


def places(root: Path) -> Iterator[Finding]:
    """Folders that stages and DVC write, where none can be."""
    for folder in (root / "data", root / "results", cache_folder(root)):
        if folder is None:
            continue
        held = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
        if not held.exists():
            yield Finding("error", f"{held}: a link to {held.readlink()}, which is not there; make it, or mount it")
        elif not held.is_dir():
            yield Finding("error", f"{held}: a file is where stages write a folder; move it out of the way")
        elif not os.access(held, os.W_OK | os.X_OK):
            yield Finding("error", f"{held}: cannot be written; {ACCESS}")


def git(root: Path) -> Iterator[Finding]:
    """Obstacles to a commit and a tag of what comes out."""
    if shutil.which("git") is None:
        yield Finding("warning", "git is not installed: no commit can say where a model came from")
        return
    try:
        if head(root) is None:
            yield Finding("remark", f"{root.resolve()} is in no git repository: `git init` keeps what made a model")
            return
    except GitError as error:
        yield Finding("warning", f"no commit can be read: {error}")
        return
    try:
        run(root, "var", "GIT_COMMITTER_IDENT")
    except GitError:
        yield Finding(
            "warning", "git does not know who commits: `git config user.name ...`, `git config user.email ...`"
        )
    turning = config(root, "core.autocrlf", "--type=bool-or-str") in ("true", "input")
    if turning and not run(root, "check-attr", "text", "--", "dvc.lock").endswith(b": unset\n"):
        yield Finding(
            "warning",
            "git turns line ends (core.autocrlf), and DVC compares bytes: put `* -text` into .gitattributes, or "
            "results that are checked out again are others",
        )
    if ignored := [name for name in KEPT if is_ignored(root, name)]:
        yield Finding(
            "warning", f"git ignores {', '.join(ignored)} (.gitignore), so no commit can say what made a model"
        )
    for key, what in (("commit.gpgSign", "commits"), ("tag.gpgSign", "tags, as `drank promote` makes one")):
        if config(root, key, "--bool") == "true" and not can_sign(root):
            yield Finding(
                "warning", f"git signs {what} ({key} = true), and user.signingKey names no secret key that is here"
            )


def is_ignored(root: Path, name: str) -> bool:
    # Not by drank.project.git, whose pathspecs this command refuses.
    return subprocess.run(["git", "check-ignore", "--quiet", name], cwd=root, capture_output=True).returncode == 0


def config(root: Path, key: str, *options: str) -> str:
    """A setting of git; empty where there is none."""
    try:
        return run(root, "config", "--get", *options, key).decode().strip()
    except GitError:
        return ""


def can_sign(root: Path) -> bool:
    """True if the key that git signs with is here; nothing is signed."""
    key, form = config(root, "user.signingKey"), config(root, "gpg.format") or "openpgp"
    if form == "ssh":
        named = key.startswith("key::") or Path(key).expanduser().is_file()
        return named or bool(config(root, "gpg.ssh.defaultKeyCommand"))
    program = config(root, f"gpg.{form}.program") or config(root, "gpg.program")
    command = [program or ("gpgsm" if form == "x509" else "gpg"), "--list-secret-keys", *([key] if key else [])]
    return shutil.which(command[0]) is not None and bool(subprocess.run(command, capture_output=True).stdout.strip())


def schema_of(file: Path) -> str | None:
    """The version of the tables of MLflow's SQLite database; None where it tells none."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=PATIENCE)) as database:
            row = database.execute("select version_num from alembic_version").fetchone()
            return str(row[0]) if row else None
    except sqlite3.Error:
        return None


def known_schemas() -> set[str]:
    """The versions that the installed MLflow knows, by the names of its migrations."""
    spec = find_spec("mlflow")
    folders = spec.submodule_search_locations if spec else None
    files = Path(next(iter(folders or ()), ""), "store/db_migrations/versions").glob("*_*.py")
    return {file.name.partition("_")[0] for file in files}


def store(root: Path) -> Iterator[Finding]:
    """Obstacles to writing results to MLflow's store."""
    uri = uri_of(root)
    if (file := sqlite_file(uri)) is not None:
        place = file if file.exists() else next(parent for parent in file.parents if parent.is_dir())
        if not os.access(place, os.W_OK):
            yield Finding(
                "warning", f"MLflow's database {file} cannot be written (ls -l {place}); results are not logged"
            )
        elif file.is_file() and file.stat().st_size and not begins(file, b"SQLite format 3"):
            yield Finding("warning", f"MLflow's database {file} is no SQLite file; move it away, or name another")
        elif file.is_file() and (version := schema_of(file)) and version not in known_schemas():
            yield Finding(
                "warning",
                f"MLflow's database {file} was written by a newer MLflow than the one here (schema {version}), which "
                f"cannot read it; `pip install --upgrade mlflow`, or name another database",
            )
        return
    if "://" not in uri and not is_database(uri):
        yield Finding("warning", f"MLFLOW_TRACKING_URI = '{uri}' is no address of a server; begin it with http://")
        return
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        yield Finding(
            "cannot say", f"MLFLOW_TRACKING_URI: a store of {address.scheme or uri}: it is asked when results are"
        )
        return
    server = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl().rstrip("/")
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=PATIENCE) as answer:
            if not answer.read(64).lstrip().startswith(b"<"):  # MLflow's is OK
                return
            why = "answers with a web page, not as MLflow does; is that its address, or does a proxy ask for a login?"
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return  # it is there, and may ask for a password
        why = f"answers {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        why = f"does not answer ({error})"
    yield Finding(
        "warning", f"MLFLOW_TRACKING_URI: {server} {why}; the stages run all the same, `drank track` logs later"
    )
