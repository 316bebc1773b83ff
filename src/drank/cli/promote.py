"""``drank promote``: which variant is the one to ship, in MLflow's registry and as a tag in git."""

import os
import shlex
import subprocess
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
    from drank.project.git import has_history
    from drank.project.params import read_params
    from drank.project.state import read_state
    from drank.tracking import promote as move_alias

    read_params(root / "params.yaml").variant(variant)
    state = read_state(root)
    in_git = has_history(root)
    if in_git:
        check_committed(root, variant)
    promotion = move_alias(state, variant)
    report(promotion)
    if in_git:
        typer.echo(f"git tag    {TAG} on {move_tag(root, promotion)[:12]}\n")
        typer.echo(f"ask git         git tag -l --format='%(contents)' {TAG}")
    else:
        typer.echo("git tag    none: not in a git repository with a commit\n")
    typer.echo(f'ask MLflow      python -c "{question(promotion)}"')
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


def move_tag(root: Path, promotion: "Promotion") -> str:
    """Put the annotated tag on HEAD, unless it is the same already on a commit with this dvc.lock; its commit.

    Raises:
        TagError: git refused, for want of a user name for instance.
    """
    from drank.project.git import file_at, resolve

    lines = {
        "variant": promotion.variant,
        "allocation_sha256": promotion.allocation_sha256,
        "model_dvc_md5": promotion.model_md5,
    }
    message = "".join(f"{key}: {value}\n" for key, value in lines.items())
    if git(root, "tag", "-l", "--format=%(contents)", TAG).strip() != message.strip() or (
        file_at(root, TAG, "dvc.lock") != file_at(root, "HEAD", "dvc.lock")
    ):
        git(root, "tag", "--annotate", "--force", "--message", message, TAG, "HEAD")
    return resolve(root, TAG) or ""


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise TagError(f"git {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def report(promotion: "Promotion") -> None:
    """Say on standard output what is champion now, and by which hashes it is told."""
    made = "new" if promotion.is_new else "as before"
    typer.echo(f"champion   {promotion.variant}: version {promotion.version} of registered model drank ({made})")
    typer.echo(f"allocation data/allocation/{promotion.variant}.json, sha256 {promotion.allocation_sha256}")
    typer.echo(f"model      data/models/{promotion.variant}, md5 in dvc.lock {promotion.model_md5}")
    typer.echo(f"run        {promotion.link}")


def question(promotion: "Promotion") -> str:
    """The program that asks MLflow alone which allocation made the champion."""
    # The variable may hold a password, and MLflow reads it by itself.
    address = "" if os.environ.get("MLFLOW_TRACKING_URI") else repr(promotion.tracking_uri)
    version = f"MlflowClient({address}).get_model_version_by_alias('drank', 'champion')"
    return f"from mlflow import MlflowClient; print({version}.tags['allocation.sha256'])"
