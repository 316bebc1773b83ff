"""The surroundings of the project: git, MLflow's store, and the folders that are written."""

import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from drank.planning.facts import Facts
from drank.preflight.finding import Finding
from drank.project.dvc import cache_folder
from drank.project.git import GitError, head, run
from drank.project.refusals import ACCESS
from drank.tracking.store import is_database, sqlite_file, uri_of

PATIENCE = 1.0  # seconds for a server's answer
KEPT = ("params.yaml", "dvc.yaml", "dvc.lock", "results/a.json", "data/allocation/a.json")  # by git


def git(facts: Facts) -> Iterator[Finding]:
    """Obstacles to a commit of what comes out."""
    root = facts.root
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
        yield Finding("warning", "git does not know who commits: set `git config user.name` and `user.email`")
    # Not by drank.project.git, whose pathspecs this command refuses.
    ignored = subprocess.run(["git", "check-ignore", *KEPT], cwd=root, capture_output=True, text=True).stdout.split()
    if ignored:
        yield Finding("warning", f"git ignores {', '.join(ignored)}, so no commit can say what made a model")
    for key, what in (("commit.gpgSign", "commits"), ("tag.gpgSign", "tags, as `drank promote` makes one")):
        if _config(root, key, "--bool") == "true" and not _can_sign(root):
            yield Finding(
                "warning", f"git signs {what} ({key} = true), and user.signingKey names no secret key that is here"
            )


def _config(root: Path, key: str, *options: str) -> str:
    """A setting of git; empty where there is none."""
    try:
        return run(root, "config", "--get", *options, key).decode().strip()
    except GitError:
        return ""


def _can_sign(root: Path) -> bool:
    """True if the key that git signs with is here; nothing is signed."""
    key, form = _config(root, "user.signingKey"), _config(root, "gpg.format") or "openpgp"
    if form == "ssh":
        named = key.startswith("key::") or Path(key).expanduser().is_file()
        return named or bool(_config(root, "gpg.ssh.defaultKeyCommand"))
    program = _config(root, f"gpg.{form}.program") or _config(root, "gpg.program")
    command = [program or ("gpgsm" if form == "x509" else "gpg"), "--list-secret-keys", *([key] if key else [])]
    return shutil.which(command[0]) is not None and bool(subprocess.run(command, capture_output=True).stdout.strip())


def places(facts: Facts) -> Iterator[Finding]:
    """Folders that stages and DVC write, where none can be."""
    for folder in (facts.root / "data", facts.root / "results", cache_folder(facts.root)):
        if folder is None:
            continue
        held = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
        if not held.exists():
            yield Finding("error", f"{held}: a link to {held.readlink()}, which is not there; make it, or mount it")
        elif not held.is_dir():
            yield Finding("error", f"{held}: a file is where stages write a folder; move it out of the way")
        elif not os.access(held, os.W_OK | os.X_OK):
            yield Finding("error", f"{held}: cannot be written; {ACCESS}")


def _beginning(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(15)


def store(facts: Facts) -> Iterator[Finding]:
    """Obstacles to writing results to MLflow's store."""
    uri = uri_of(facts.root)
    if (file := sqlite_file(uri)) is not None:
        place = file if file.exists() else next(parent for parent in file.parents if parent.is_dir())
        if not os.access(place, os.W_OK):
            yield Finding(
                "warning", f"MLflow's database {file} cannot be written (ls -l {place}); results are not logged"
            )
        elif file.is_file() and _beginning(file) not in (b"", b"SQLite format 3"):
            yield Finding("warning", f"MLflow's database {file} is no SQLite file; move it away, or name another")
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
