"""Asking git: which commit's dvc.lock has a hash, and what a file was at a revision. Nothing is checked out."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Commit:
    """A commit, and whether the current branch has it (an experiment's is reachable from its own ref only)."""

    sha: str
    date: str
    subject: str
    on_head: bool


def has_history(root: Path) -> bool:
    """Whether ``root`` lies in a git repository with at least one commit."""
    return shutil.which("git") is not None and _git(root, "rev-parse", "--verify", "--quiet", "HEAD") is not None


def is_shallow(root: Path) -> bool:
    return _git(root, "rev-parse", "--is-shallow-repository") == b"true\n"


def find_commits(root: Path, text: str, path: str) -> list[Commit]:
    """Commits that added or removed ``text`` in ``path``, oldest first: the current branch's, then any other ref's.

    Other refs include branches, tags, and the experiments of ``dvc exp`` (``refs/exps``).
    """
    found: dict[str, Commit] = {}
    for scope in ("HEAD", "--all"):
        rows = _git(root, "log", scope, "--reverse", "--format=%H%x00%cs%x00%s", f"-S{text}", "--", path) or b""
        for row in rows.decode(errors="replace").splitlines():
            sha, date, subject = row.split("\0")
            found.setdefault(sha, Commit(sha, date, subject, scope == "HEAD"))
    return list(found.values())


def file_at(root: Path, revision: str, path: str) -> bytes | None:
    """The bytes of a file, given relative to ``root``, at a revision; None where it had no such file."""
    return _git(root, "show", f"{revision}:./{path}")


def keeps(root: Path, path: Path) -> bool:
    """Whether git has this file or one of this folder, or would have it with the next ``git add``."""
    asked = ("ls-files", "--cached", "--others", "--exclude-standard", "--", str(path.absolute()))
    return shutil.which("git") is not None and bool(_git(root, *asked))


def resolve(root: Path, revision: str) -> str | None:
    """The commit that a revision names; None where there is none."""
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return None if found is None else found.decode().strip()


def origin(root: Path) -> str:
    """Where to clone from: the remote `origin`, without a password, or else the repository's own folder."""
    url = _git(root, "config", "--get", "remote.origin.url") or _git(root, "rev-parse", "--show-toplevel") or b"."
    return re.sub(r"^(https?://)[^/]*@", r"\1", url.decode().strip())


def _git(root: Path, *arguments: str) -> bytes | None:
    """Standard output of git, None where it says no."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    return done.stdout if done.returncode == 0 else None
