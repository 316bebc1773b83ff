"""``drank run`` and ``drank track``: the pipeline, its projection into MLflow, and the table of variants."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from drank.cli.options import CommandError, Root, console

if TYPE_CHECKING:
    from rich.table import Table

    from drank.tracking import Tracked


def run(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages to reproduce, as in dvc repro; all of them.")
    ] = None,
    root: Root = Path(),
) -> None:
    """Reproduce the pipeline, log it to MLflow and show the table of variants."""
    from drank.project.turns import turn
    from drank.tracking import track as project

    look_ahead(root, say)
    with turn(str(root.resolve()), f"another `drank run` in {root.resolve()}"):
        # While the first stages use one core: importing MLflow and making a new store take a quarter of a minute.
        opening = Thread(target=open_early, args=(root,), daemon=True)
        opening.start()
        reproduce(root, targets or [])
        opening.join()
        tracked = project(root)
    console().print(table_of_variants(root / "results/summary.csv"))
    report(tracked)


def look_ahead(root: Path, say: Callable[[str], None]) -> None:
    """Say everything that can be known before anything computes.

    Raises:
        CommandError: some of it is an error.
    """
    from drank.preflight import preflight

    findings = preflight(root)
    for finding in findings:
        say(f"{finding.level}: {finding.text}")
    counts = Counter(finding.level for finding in findings)
    if counts["error"]:
        told = ", ".join(f"{n} {level}" for level, n in counts.items())
        raise CommandError(f"nothing was started ({told}): mend the errors above, or run the stages by `dvc repro`")


def track(root: Root = Path()) -> None:
    """Log to MLflow what `dvc repro` left, restored variants included; the same state is never logged twice."""
    from drank.tracking import track as project

    report(project(root))


def open_early(root: Path) -> None:
    """Open MLflow's store once; one that cannot be used is told now, and not only when all has run."""
    from drank.tracking.store import open_store

    try:
        with open_store(root):
            pass
    except ValueError as error:
        say(f"warning: {error}; the stages run all the same, and `drank track` logs what they leave")


def reproduce(root: Path, targets: list[str]) -> None:
    """Run ``dvc repro`` in ``root``, with the Python that runs us as the ``python`` of its stages.

    On standard error it says what will run and where it is; standard output is DVC's, line by line.

    Raises:
        CommandError: DVC or a stage failed.
    """
    from drank.planning.plan import Plan
    from drank.project.damage import find_torn

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # DVC by itself gives up after 3 seconds, also at the end of a stage of hours, if a `dvc status` is at work then.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    plan = Plan(root, targets, say)
    with subprocess.Popen(command, cwd=root, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE) as process:
        for line in process.stdout or ():
            plan.follow(line.decode(errors="replace"))
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    if process.returncode != 0:
        torn = "".join(f"; {wrong}, or `drank check --mend`" for wrong in find_torn(root).values())
        raise CommandError(f"dvc repro ended with exit status {process.returncode}; nothing was logged to MLflow{torn}")


def say(text: str) -> None:
    """On standard error, if anybody listens there."""
    with suppress(OSError):
        typer.echo(text, err=True)


def report(tracked: "Tracked") -> None:
    """Say on standard output what was logged and where to look at it."""
    typer.echo(f"MLflow runs created: {', '.join(tracked.created) or 'none'}")
    typer.echo(f"already there: {', '.join(tracked.existing) or 'none'}")
    typer.echo(tracked.where)


def table_of_variants(summary: Path) -> "Table":
    """results/summary.csv as the report shows it: a row per variant, dense ones first."""
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

    from drank.project.tolerance import other_dtypes
    from drank.views.page import readable

    rows = pd.read_csv(summary, keep_default_na=False, na_values=[""])
    dtypes = rows["dtype"].dropna() if "dtype" in rows else ()
    table = Table(caption=other_dtypes({"dtype": dtype} for dtype in dtypes))
    shown = readable(rows)
    for column in map(str, shown):
        table.add_column(Text(column), justify="left" if column in ("variant", "preset") else "right")
    for row in shown.itertuples(index=False):
        table.add_row(*map(str, row))
    return table
