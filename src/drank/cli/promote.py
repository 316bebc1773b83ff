"""``drank promote``: which variant is the one to ship, in MLflow's registry and as a tag in git."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drank.cli.options import Root

if TYPE_CHECKING:
    from drank.tracking import Promotion

TAG = "champion"


class UncommittedError(ValueError):
    """No commit holds what made the variant, so no tag could point to it."""


class TagError(ValueError):
    """git did not make the tag."""


def promote(
    variant: Annotated[str, typer.Argument(help="A variant of params.yaml, reproduced and committed.")],
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
            uri = store.uri
    run = promotion.run
    typer.echo(
        f"champion   {variant}: version {run.version} of registered model drank "
        f"({'new' if promotion.is_new else 'as before'})\n"
        f"allocation data/allocation/{variant}.json, sha256 {run.allocation_sha256}\n"
        f"model      data/models/{variant}, md5 in dvc.lock {promotion.model_md5}\n"
        f"run        {run.link}"
    )
    if commit:
        typer.echo(f"git tag    {TAG} on {commit[:12]}\n")
        typer.echo(f"ask git         git tag -l --format='%(contents)' {TAG}")
    else:
        typer.echo("git tag    none: not in a git repository with a commit\n")
    # The variable may hold a password, and MLflow reads it by itself.
    address = "" if os.environ.get("MLFLOW_TRACKING_URI") else repr(uri)
    version = f"MlflowClient({address}).get_model_version_by_alias('drank', 'champion')"
    question = f"from mlflow import MlflowClient; print({version}.tags['allocation.sha256'])"
    program = shlex.quote(question) if set('"$`\\!') & set(question) else f'"{question}"'
    typer.echo(f"ask MLflow      python -c {program}")
    typer.echo(f"ask the folder  sha256sum data/models/{variant}/allocation.json")


def check_committed(root: Path, variant: str) -> None:
    """Refuse a variant of which some file that git keeps is not in HEAD as it is.

    Raises:
        UncommittedError: such a file.
    """
    from drank.project.git import file_at

    kept = ["dvc.yaml", "params.yaml", "dvc.lock", f"data/allocation/{variant}.json", f"results/{variant}.json"]
    if changed := [path for path in kept if file_at(root, "HEAD", path) != (root / path).read_bytes()]:
        raise UncommittedError(
            f"{', '.join(changed)}: not committed as they are, so no commit would say what made {variant}; "
            f"`git add {' '.join(changed)} && git commit` first"
        )


def check_tag(root: Path) -> None:
    """Refuse to move a tag that somebody else made, or to make one in nobody's name.

    Raises:
        TagError: such a tag.
    """
    git(root, "var", "GIT_COMMITTER_IDENT")
    if (said := git(root, "tag", "-l", "--format=%(contents)", TAG)) and not said.startswith("variant: "):
        raise TagError(
            f"git has a tag {TAG} that drank did not make ({said.splitlines()[0]}); rename or delete it "
            f"(git tag -d {TAG}), then promote again"
        )


@contextmanager
def moved_tag(root: Path, promotion: "Promotion") -> Iterator[str]:
    """Put the annotated tag on HEAD, unless it is the same already on a commit with this dvc.lock; its commit.

    The tag goes back if the block fails, so that git and MLflow name one champion.

    Raises:
        TagError: git refused, for want of a user name or a key for instance.
    """
    from drank.project.git import file_at, resolve

    ref = f"refs/tags/{TAG}"
    message = (
        f"variant: {promotion.run.name}\nallocation_sha256: {promotion.run.allocation_sha256}\n"
        f"model_dvc_md5: {promotion.model_md5}\n"
    )
    before = git(root, "for-each-ref", "--format=%(objectname)", ref).strip()
    # A signature may follow the message.
    told = git(root, "tag", "-l", "--format=%(contents)", TAG).startswith(message)
    if not told or file_at(root, ref, "dvc.lock") != file_at(root, "HEAD", "dvc.lock"):
        git(root, "tag", "--annotate", "--force", "--message", message, TAG, "HEAD")
    try:
        yield resolve(root, ref) or ""
    except BaseException:
        git(root, "update-ref", *((ref, before) if before else ("-d", ref)))
        raise


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise TagError(f"git {shlex.join(arguments)}: {done.stderr.strip()}; nothing was promoted")
    return done.stdout
