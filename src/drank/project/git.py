"""Asking git: which commit's dvc.lock has a hash, and what a file was at a revision. Nothing is checked out.

"There is none" is an answer: no repository, no commit, no such file. That git cannot be asked is an error: it is not
installed, will not read a repository of another owner, or finds it damaged.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIT = ("git", "--literal-pathspecs", "-c", "log.showSignature=false")  # whatever a path or a user's settings hold


class GitError(ValueError):
    """git cannot be asked, or refuses; the message has git's own words, which say what helps."""


@dataclass(frozen=True)
class Commit:
    """A commit, and whether the current branch has it (an experiment's is reachable from its own ref only)."""

    sha: str
    date: str
    subject: str
    on_head: bool


def has_history(root: Path) -> bool:
    """True if ``root`` lies in a git repository with at least one commit.

    Raises:
        GitError: there is a repository, and git cannot be asked about it; so for every function here.
    """
    return resolve(root, "HEAD") is not None


def is_shallow(root: Path) -> bool:
    return _ask(root, "rev-parse", "--is-shallow-repository") == b"true\n"


def head(root: Path) -> tuple[str | None, bool] | None:
    """The commit of HEAD (None before the first), and whether files differ from it; None outside git."""
    status = _ask(root, "status", "--porcelain")
    return None if status is None else (resolve(root, "HEAD"), bool(status.strip()))


def find_commits(root: Path, text: str, path: str) -> list[Commit]:
    """Commits that added or removed ``text`` in ``path``, oldest first: the current branch's, then any other ref's.

    Other refs include branches, tags, and the experiments of ``dvc exp`` (``refs/exps``).
    """
    found: dict[str, Commit] = {}
    for scope in ("HEAD", "--all"):
        # Merges too (-m): no other commit has a lock that was written while a merge was resolved.
        rows = run(root, "log", scope, "-m", "--reverse", "--format=%H%x00%cs%x00%s", f"-S{text}", "--", path)
        for row in rows.decode(errors="replace").splitlines():
            sha, date, subject = row.split("\0")
            found.setdefault(sha, Commit(sha, date, subject, scope == "HEAD"))
    return list(found.values())


def file_at(root: Path, revision: str, path: str) -> bytes | None:
    """The bytes of a file, given relative to ``root``, at a revision; None where it had no such file."""
    listed = _ask(root, "ls-tree", revision, "--", path)
    return run(root, "show", f"{revision}:./{path}") if listed else None  # which may lie in a remote, out of reach


def keeps(root: Path, path: Path) -> bool:
    """True if git has this file or one of this folder, or would have it with the next ``git add``."""
    return bool(_ask(root, "ls-files", "--cached", "--others", "--exclude-standard", "--", str(path.absolute())))


def resolve(root: Path, revision: str) -> str | None:
    """The commit that a revision names; None where there is none."""
    found = _ask(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    return None if found is None else found.decode().strip()


def origin(root: Path) -> str:
    """Where to clone from, without a password: the remote `origin`, or else the repository's own folder."""
    url = _ask(root, "config", "--get", "remote.origin.url") or run(root, "rev-parse", "--show-toplevel")
    return re.sub(r"^(https?://)[^/@]*@", r"\1", url.decode().strip())


def run(root: Path, *arguments: str) -> bytes:
    """Standard output of a git command that has to succeed."""
    try:
        done = subprocess.run([*GIT, *arguments], cwd=root, capture_output=True)
    except FileNotFoundError:
        raise GitError(f"{root}: git is not installed, or not on the PATH; install it") from None
    if done.returncode != 0:
        told = " ".join(done.stderr.decode(errors="replace").split())
        raise GitError(f"{root}: `git {arguments[0]}` says: {told or f'exit status {done.returncode}'}")
    return done.stdout


def _ask(root: Path, *arguments: str) -> bytes | None:
    """Standard output of git; None where it says no, or where there is no repository."""
    try:
        return run(root, *arguments)
    except GitError:
        if any((folder / ".git").exists() for folder in (root.absolute(), *root.absolute().parents)):
            run(root, "rev-parse", "--git-dir")  # whether the repository can be read at all
        return None
