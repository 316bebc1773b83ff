"""``drank check``: whether what DVC keeps is still what the stages wrote, byte by byte."""

from pathlib import Path
from typing import Annotated

import typer

from drank.cli.options import CommandError, Root


def check(
    root: Root = Path(),
    mend: Annotated[
        bool,
        typer.Option(
            "--mend",
            help="Take what is damaged away, so that `dvc pull` or `dvc repro` brings it back; not what git keeps.",
        ),
    ] = False,
) -> None:
    """Read every file of dvc.lock again, in the workspace and in DVC's cache, and compare it with its md5.

    DVC's notes that a kill has torn (dvc.lock, .dvc/tmp/rwlock) are told before that, and deleted by --mend.

    DVC itself trusts a file whose size and time of change it knows, and an entry of its cache that is read-only.
    """
    from drank.project import damage
    from drank.project.git import keeps
    from drank.project.progress import progress

    if torn := damage.find_torn(root):
        for path, wrong in torn.items():
            typer.echo(wrong)
            if mend:
                path.unlink()
        if not mend:
            raise CommandError("DVC cannot read its notes; `drank check --mend`, while no DVC is at work, deletes them")
        typer.echo(f"{len(torn)} deleted; `dvc repro` makes them anew, of what its cache remembers")
        return
    found = list(damage.find_damage(root, lambda paths: progress(list(paths), desc="check", unit="outs")))
    cached = [one for one in found if not keeps(root, one.path)]
    for one in found:
        was = f"damaged: md5 {one.found}, but {one.stage} wrote {one.recorded}"
        if one not in cached:  # somebody may have edited it
            was += f"; `git checkout -- {one.path}` or `dvc repro -f {one.stage}` brings it back"
        typer.echo(
            f"{one.path}: {was if one.recorded else f'not recorded: {one.stage} did not write it; move it away'}"
        )
    gone = damage.mend(cached) if mend else []
    if len(gone) < len(found):
        taken = f"; {len(gone)} taken away" if mend else "; `drank check --mend` takes away those that DVC keeps"
        raise CommandError(f"{len(found)} files are not as recorded{taken}")
    typer.echo(f"{len(gone)} taken away; `dvc repro` makes them again" if gone else "every file is as recorded")
