"""The surroundings of the project: git, and the folders that are written."""

import os
import shutil
import subprocess
from collections.abc import Iterator

from drank.planning.facts import Facts
from drank.preflight.finding import Finding
from drank.project.dvc import cache_folder
from drank.project.git import GitError, head, run
from drank.project.refusals import ACCESS

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
