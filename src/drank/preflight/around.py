"""The surroundings of the project: its sources, git, and MLflow's store."""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from drank.preflight.facts import Facts, Finding, Level, cached_snapshot, offline
from drank.project.refusals import LFS_POINTER

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
    """Whether git will commit and tag what comes out."""
    if shutil.which("git") is None:
        yield Finding("warning", "git is not installed: no commit can say where a model came from")
        return
    inside = asked_git(root, "rev-parse", "--is-inside-work-tree")
    if "dubious ownership" in inside.stderr or "unsafe repository" in inside.stderr:
        place = root.resolve()
        yield Finding(
            "warning",
            f"git does not trust {place}, which another user owns (dubious ownership): no commit can be read; "
            f"`git config --global --add safe.directory {place}`",
        )
        return
    if inside.returncode:
        yield Finding("remark", f"{root.resolve()} is in no git repository: `git init` keeps what made a model")
        return
    if asked_git(root, "var", "GIT_COMMITTER_IDENT").returncode:
        yield Finding(
            "warning", "git does not know who commits: `git config user.name ...`, `git config user.email ...`"
        )
    for key, what in (("commit.gpgSign", "commits"), ("tag.gpgSign", "tags, as `drank promote` makes one")):
        if config(root, key, "--bool") == "true" and not can_sign(root):
            yield Finding(
                "warning", f"git signs {what} ({key} = true), and user.signingKey names no secret key that is here"
            )


def asked_git(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(["git", *arguments], cwd=root, env=english, capture_output=True, text=True)


def config(root: Path, key: str, *options: str) -> str:
    return asked_git(root, "config", "--get", *options, key).stdout.strip()


def can_sign(root: Path) -> bool:
    """Whether the key that git signs with is here; nothing is signed."""
    key, form = config(root, "user.signingKey"), config(root, "gpg.format") or "openpgp"
    if form == "ssh":
        return (
            bool(config(root, "gpg.ssh.defaultKeyCommand"))
            or key.startswith("key::")
            or Path(key).expanduser().is_file()
        )
    program = config(root, f"gpg.{form}.program") or config(root, "gpg.program")
    command = [program or ("gpgsm" if form == "x509" else "gpg"), "--list-secret-keys", *([key] if key else [])]
    return shutil.which(command[0]) is not None and bool(subprocess.run(command, capture_output=True).stdout.strip())


def store(root: Path) -> Iterator[Finding]:
    """Whether MLflow's store will take the results."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or ""
    address = urlsplit(uri)
    if address.scheme in ("http", "https"):
        shown = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
        try:
            with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=PATIENCE):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # it is there, and may ask for a password
            why = f"answers {error.code}"
        except (OSError, ValueError, HTTPException) as error:
            why = f"does not answer ({error})"
        yield Finding(
            "warning", f"MLFLOW_TRACKING_URI: {shown} {why}; the stages run all the same, `drank track` logs later"
        )
    elif not uri or address.scheme.startswith("sqlite"):
        home = Path(os.environ.get("DVC_ROOT") or root)
        file = Path(unquote(uri.partition(":///")[2].partition("?")[0])) if uri else home / "mlflow.db"
        place = file if file.exists() else next(parent for parent in file.absolute().parents if parent.is_dir())
        if not os.access(place, os.W_OK):
            yield Finding(
                "warning", f"MLflow's database {file} cannot be written (ls -l {place}); results are not logged"
            )
        elif file.is_file() and file.stat().st_size and not begins(file, b"SQLite format 3"):
            yield Finding("warning", f"MLflow's database {file} is no SQLite file; move it away, or name another")
    else:
        yield Finding(
            "cannot say", f"MLFLOW_TRACKING_URI: a store of {address.scheme or uri}: it is asked when results are"
        )
