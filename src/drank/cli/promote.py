"""``drank promote``: which variant is the one to ship, in MLflow's registry and in DVC's, which is tags of git."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from drank.cli.options import Root, variants
from drank.project.files import write_text
from drank.project.git import file_at, resolve
from drank.project.git import run as git

if TYPE_CHECKING:
    from drank.tracking import Promotion

ARTIFACT = "champion"  # of dvc.yaml; GTO's name for a version of it is a tag, ARTIFACT@v1.0.0
VERSION = re.compile(rf"refs/tags/{ARTIFACT}@v(\d+)\.\d+\.\d+")
QUESTION = (
    'from mlflow import MlflowClient; print(MlflowClient({}).get_model_version_by_alias("drank", "champion")'
    '.tags["allocation.sha256"])'
)


class UncommittedError(ValueError):
    """No commit holds what made the variant, so no tag could point to it."""


class TagError(ValueError):
    """No tag can be made."""


def promote(
    variant: Annotated[
        str, typer.Argument(help="A variant of params.yaml, reproduced and committed.", autocompletion=variants)
    ],
    root: Root = Path(),
) -> None:
    """Make a variant the champion: an alias in MLflow's registry, and a tag of git for DVC's. No weights are copied."""
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
            git(root, "var", "GIT_COMMITTER_IDENT")  # refused where the tag would be in nobody's name
            declare(root, variant)
        with open_store(root) as store:
            # All that takes long or can be refused comes before the two steps; the first is undone with the second.
            promotion = prepare(store, state, variant, root, told)
            tagging: AbstractContextManager[str] = tagged(root, promotion) if in_git else nullcontext("")
            with tagging as tag:
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
        f"git tag    {f'{tag} on {resolve(root, tag)}' if tag else 'none: not in a git repository with a commit'}\n"
    )
    if tag:
        typer.echo(f"ask git         git tag -l --format='%(contents)' {tag}")
    typer.echo(f"ask MLflow      python -c {shlex.quote(QUESTION.format(address))}")
    typer.echo(f"ask the folder  sha256sum data/models/{variant}/allocation.json")


def check_committed(root: Path, variant: str) -> None:
    """Refuse a variant of which some file that git keeps is not in HEAD as it is."""
    kept = ["dvc.yaml", "params.yaml", "dvc.lock", f"data/allocation/{variant}.json", f"results/{variant}.json"]
    if changed := [path for path in kept if file_at(root, "HEAD", path) != (root / path).read_bytes()]:
        told = f"not committed as they are, so no commit would say what made {variant}"
        raise UncommittedError(f"{', '.join(changed)}: {told}; `git add {' '.join(changed)} && git commit` first")


def declare(root: Path, variant: str) -> None:
    """Make the variant's folder the artifact of dvc.yaml, which a commit must have before a tag of it means that.

    Raises:
        UncommittedError: dvc.yaml named another folder; now it names this one.
        TagError: dvc.yaml has no such artifact.
    """
    path, folder = root / "dvc.yaml", f"data/models/{variant}"
    text = path.read_text(encoding="utf-8")
    if (declared := _declared(text)) == folder:
        return
    changed = text.replace(f"    path: {declared}\n", f"    path: {folder}\n")
    if _declared(changed) != folder:
        raise TagError(
            f"{path}: no artifact `{ARTIFACT}` with a path in a line of its own; add it, and commit it:\n"
            f"artifacts:\n  {ARTIFACT}:\n    path: {folder}\n    type: model"
        )
    write_text(path, changed)
    raise UncommittedError(
        f"{path}: its artifact `{ARTIFACT}` is {folder} now, no longer {declared}, and a commit has to say so; "
        f"`git commit -m 'Champion: {variant}' {path}`, then promote again"
    )


def _declared(text: str) -> str | None:
    """The folder that a dvc.yaml has as the artifact."""
    return ((yaml.safe_load(text).get("artifacts") or {}).get(ARTIFACT) or {}).get("path")


@contextmanager
def tagged(root: Path, promotion: "Promotion") -> Iterator[str]:
    """Put GTO's next version tag, an annotated one, on HEAD; the tag.

    The newest one stays the newest where it tells the same on a commit with this dvc.lock. A new tag is taken away if
    the block fails, so that git and MLflow name one champion.

    Raises:
        GitError: git refused, for want of a key for instance.
    """
    message = (
        f"variant: {promotion.run.name}\nallocation_sha256: {promotion.run.allocation_sha256}\n"
        f"model_dvc_md5: {promotion.model_md5}\n"
    )
    refs = git(root, "for-each-ref", "--format=%(refname)", f"refs/tags/{ARTIFACT}@v*").decode().splitlines()
    newest, ref = max(((int(found[1]), ref) for ref in refs if (found := VERSION.fullmatch(ref))), default=(0, ""))
    told = git(root, "for-each-ref", "--format=%(contents)", ref).decode() if ref else ""
    if told.startswith(message) and file_at(root, ref, "dvc.lock") == file_at(root, "HEAD", "dvc.lock"):
        yield ref.removeprefix("refs/tags/")  # a signature may follow the message
        return
    tag = f"{ARTIFACT}@v{newest + 1}.0.0"
    git(root, "tag", "--annotate", "--message", message, tag, "HEAD")
    try:
        yield tag
    except BaseException:
        git(root, "update-ref", "-d", f"refs/tags/{tag}")
        raise
