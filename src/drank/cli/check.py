"""``drank check``: whether what DVC keeps is still what the stages wrote, byte by byte."""

from pathlib import Path
from typing import Annotated

import typer

from drank.cli.options import CommandError, Root
from drank.cli.pipeline import look_ahead


def check(
    root: Root = Path(),
    mend: Annotated[
        bool,
        typer.Option(
            "--mend",
            help="Take what is damaged away, so that `dvc pull` or `dvc repro` brings it back; not what git keeps.",
        ),
    ] = False,
    before: Annotated[
        bool,
        typer.Option("--before", help="Only say what `drank run` would find before it starts, and whether it would."),
    ] = False,
) -> None:
    """Read every file of dvc.lock again, in the workspace and in DVC's cache, and compare it with its md5.

    DVC's notes that a kill has torn (dvc.lock, .dvc/tmp/rwlock) are told before that, and deleted by --mend.

    DVC itself trusts a file whose size and time of change it knows, and an entry of its cache that is read-only.
    """
    if before:
        look_ahead(root, typer.echo)
        return
    from drank.project import damage
    from drank.project.git import GitError, keeps
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
    found = damage.find_damage(root, lambda paths: progress(list(paths), desc="check", unit="outs"))
    files = [one.path for one in found.damages]
    try:
        kept_by_git = {path for path in (*files, *(root / path for path in found.uncached)) if keeps(root, path)}
    except GitError as error:
        typer.echo(f"cannot say what git keeps, so that nothing is taken away: {error}")
        kept_by_git = set(files)
    for one in found.damages:
        told = f"damaged: md5 {one.found}, but {one.stage} wrote {one.recorded}"
        if one.recorded is None:
            told = f"not recorded: {one.stage} did not write it; move it away"
        elif one.path in kept_by_git:  # somebody may have edited it
            told += f"; `git checkout -- {one.path}` or `dvc repro -f {one.stage}` brings it back"
        typer.echo(f"{one.path}: {told}")
    for out in found.absent:
        typer.echo(f"{root / out}: cannot say: not here, nor in DVC's cache; `dvc pull` or `dvc repro` brings it")
    gone = damage.mend(one for one in found.damages if one.path not in kept_by_git) if mend else []
    amiss = [f"{len(found.damages)} files are not as recorded"] if len(gone) < len(found.damages) else []
    amiss += [f"{len(found.absent)} outs could not be compared"] if found.absent else []
    if amiss:
        taken = f"; {len(gone)} taken away" if mend else "; `drank check --mend` takes away those that DVC keeps"
        raise CommandError(" and ".join(amiss) + taken * bool(found.damages))
    if gone:
        typer.echo(f"{len(gone)} taken away; `dvc repro` makes them again")
    elif single := [path for path in found.uncached if root / path not in kept_by_git]:
        shown = ", ".join(single[:3]) + ", ..." * (len(single) > 3)
        typer.echo(
            f"{len(found.whole)} outs are as recorded here; {len(single)} of them have no whole copy in DVC's cache, "
            f"which could not be compared: {shown}"
        )
    else:
        typer.echo("every file is as recorded")
