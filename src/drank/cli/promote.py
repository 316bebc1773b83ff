"""``drank promote``: which variant is the one to ship, in MLflow's registry and as a tag in git."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drank.cli.options import Root, variants
from drank.project.git import file_at, resolve
from drank.project.git import run as git

if TYPE_CHECKING:
    from drank.tracking import Promotion

TAG = "champion"
REF = f"refs/tags/{TAG}"
QUESTION = (
    'from mlflow import MlflowClient; print(MlflowClient({}).get_model_version_by_alias("drank", "champion")'
    '.tags["allocation.sha256"])'
)


class UncommittedError(ValueError):
    """No commit holds what made the variant, so no tag could point to it."""


class TagError(ValueError):
    """The tag cannot be made, or is not ours to move."""


def promote(
    variant: Annotated[
        str, typer.Argument(help="A variant of params.yaml, reproduced and committed.", autocompletion=variants)
    ],
    root: Root = Path(),
) -> None:
    """Make a variant the champion: an alias of MLflow's registered model, and a tag of git. No weights are copied."""
    from drank.project.params import read_params
    from drank.tracking import open_store, prepare, set_champion
    from drank.tracking.projection import git_tags, held_state

    read_params(root / "params.yaml").variant(variant)
    told = git_tags(root)
    if "git.unknown" in told:
        raise TagError(f"no commit can be tagged: {told['git.unknown']}; nothing was promoted")
    in_git = "git.commit" in told
    with held_state(root) as state:
        if in_git:
            check_committed(root, variant)
            check_tag(root)
        with open_store(root) as store:
            # All that takes long or can be refused comes before the two moves, and the first is undone with the second.
            promotion = prepare(store, state, variant, root, told)
            moving: AbstractContextManager[str] = moved_tag(root, promotion) if in_git else nullcontext("")
            with moving as commit:
                set_champion(store, promotion)
            # The variable may hold a password, and MLflow reads it by itself.
            address = "" if os.environ.get("MLFLOW_TRACKING_URI") else json.dumps(store.uri, ensure_ascii=False)
    run = promotion.run
    typer.echo(
        f"champion   {variant}: version {run.version} of registered model drank "
        f"({'new' if promotion.is_new else 'as before'})\n"
        f"allocation data/allocation/{variant}.json, sha256 {run.allocation_sha256}\n"
        f"model      data/models/{variant}, md5 in dvc.lock {promotion.model_md5}\n"
        f"run        {run.link}\n"
        f"git tag    {f'{TAG} on {commit[:12]}' if commit else 'none: not in a git repository with a commit'}\n"
    )
    if commit:
        typer.echo(f"ask git         git tag -l --format='%(contents)' {TAG}")
    typer.echo(f"ask MLflow      python -c {shlex.quote(QUESTION.format(address))}")
    typer.echo(f"ask the folder  sha256sum data/models/{variant}/allocation.json")


def check_committed(root: Path, variant: str) -> None:
    """Refuse a variant of which some file that git keeps is not in HEAD as it is."""
    kept = ["dvc.yaml", "params.yaml", "dvc.lock", f"data/allocation/{variant}.json", f"results/{variant}.json"]
    if changed := [path for path in kept if file_at(root, "HEAD", path) != (root / path).read_bytes()]:
        told = f"not committed as they are, so no commit would say what made {variant}"
        raise UncommittedError(f"{', '.join(changed)}: {told}; `git add {' '.join(changed)} && git commit` first")


def check_tag(root: Path) -> None:
    """Refuse to move a tag that somebody else made, or to make one in nobody's name."""
    git(root, "var", "GIT_COMMITTER_IDENT")
    if (said := contents(root)) and not said.startswith("variant: "):
        raise TagError(
            f"git has a tag {TAG} that drank did not make ({said.splitlines()[0]}); rename or delete it "
            f"(git tag -d {TAG}), then promote again"
        )


@contextmanager
def moved_tag(root: Path, promotion: "Promotion") -> Iterator[str]:
    """Put the annotated tag on HEAD, unless it is the same already on a commit with this dvc.lock; its commit.

    The tag goes back if the block fails, so that git and MLflow name one champion.

    Raises:
        GitError: git refused, for want of a key for instance.
    """
    message = (
        f"variant: {promotion.run.name}\nallocation_sha256: {promotion.run.allocation_sha256}\n"
        f"model_dvc_md5: {promotion.model_md5}\n"
    )
    before = git(root, "for-each-ref", "--format=%(objectname)", REF).decode().strip()
    same = contents(root).startswith(message)  # a signature may follow
    if not same or file_at(root, REF, "dvc.lock") != file_at(root, "HEAD", "dvc.lock"):
        git(root, "tag", "--annotate", "--force", "--message", message, TAG, "HEAD")
    try:
        yield resolve(root, REF) or ""
    except BaseException:
        git(root, "update-ref", *((REF, before) if before else ("-d", REF)))
        raise


def contents(root: Path) -> str:
    """The message of the tag; empty where there is none."""
    return git(root, "tag", "-l", "--format=%(contents)", TAG).decode()
