"""``drank run`` and ``drank track``: the pipeline, its projection into MLflow, and the table of variants."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shutil import disk_usage
from threading import Thread
from typing import IO, TYPE_CHECKING, Annotated

import typer

from drank.cli.options import CommandError, Root

if TYPE_CHECKING:
    from rich.table import Table

    from drank.tracking import Tracked

Row = dict[str, str]
SCARCE = 2**28  # bytes; DVC says neither which disk is full nor how much is left


def run(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Stages to reproduce, as in dvc repro; all of them.")
    ] = None,
    root: Root = Path(),
) -> None:
    """Reproduce the pipeline, log it to MLflow and show the table of variants."""
    from rich.console import Console

    from drank.project.turns import turn
    from drank.tracking import track as project

    with turn(str(root.resolve()), f"another `drank run` in {root.resolve()}"):
        opening = opened_store(root)
        reproduce(root, targets or [])
        opening.join()
        tracked = project(root)
    # On a terminal the table fits itself to it; in a log file, where the width is unknown, it must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table_of_variants(read_summary(root / "results/summary.csv")))
    report(tracked)


def track(root: Root = Path()) -> None:
    """Log to MLflow what `dvc repro` left, restored variants included; the same state is never logged twice."""
    from drank.tracking import track as project

    report(project(root))


def opened_store(root: Path) -> Thread:
    """Open MLflow's store while the first stages run, which use one core: importing MLflow and making the tables of a
    new store take a quarter of a minute. A store that cannot be used is told now, and not only when all has run.
    """
    from drank.tracking.store import open_store

    def opening() -> None:
        try:
            with open_store(root):
                pass
        except ValueError as error:
            say(f"warning: {error}; the stages run all the same, and `drank track` logs what they leave")

    thread = Thread(target=opening, daemon=True)
    thread.start()
    return thread


def reproduce(root: Path, targets: list[str]) -> None:
    """Run ``dvc repro`` in ``root``, with the Python that runs us as the ``python`` of its stages.

    On standard error it says what will run and where it is; standard output is DVC's.

    Raises:
        CommandError: DVC or a stage failed.
    """
    from drank.planning.plan import Plan
    from drank.project.damage import find_torn

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # DVC by itself gives up after 3 seconds, also at the end of a stage of hours, if a `dvc status` is at work then.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *targets]
    plan = Plan(root, targets, say)
    status = passing_on(command, root, os.environ | {"PATH": path}, plan.follow)
    if status != 0:
        full = f" ({free:,} bytes are left in {root.resolve()})" if (free := disk_usage(root).free) < SCARCE else ""
        torn = "".join(f"; {wrong}, or `drank check --mend`" for wrong in find_torn(root).values())
        raise CommandError(f"dvc repro ended with exit status {status}{full}; nothing was logged to MLflow{torn}")


def say(text: str) -> None:
    """On standard error, if anybody listens there."""
    with suppress(OSError):
        typer.echo(text, err=True)


def passing_on(command: list[str], root: Path, environment: dict[str, str], follow: Callable[[str], None]) -> int:
    """Run a command and give its standard output on, line by line, each after ``follow`` has seen it.

    Where ours is closed, so is the command's. Returns its exit status.
    """
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE)
    reader = Thread(target=give_on, args=(process.stdout, follow), daemon=True)
    reader.start()
    try:
        status = process.wait()
    except BaseException:  # as subprocess.run: after an interrupt the command has a moment to end by itself
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(0.25)
        process.kill()
        raise
    reader.join(5)  # a stage that outlives a killed DVC holds the pipe until it ends, too
    return status


def give_on(lines: IO[bytes], follow: Callable[[str], None]) -> None:
    """Copy lines to standard output, and close their source where it takes no more."""
    # Without a buffer, which would keep what could not be written and try again when Python ends.
    with lines, suppress(OSError), open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as output:
        for line in lines:
            follow(line.decode(errors="replace"))
            output.write(line)


def report(tracked: "Tracked") -> None:
    """Say on standard output what was logged and where to look at it."""
    typer.echo(f"MLflow runs created: {', '.join(tracked.created) or 'none'}")
    typer.echo(f"already there: {', '.join(tracked.existing) or 'none'}")
    typer.echo(tracked.where)


def read_summary(path: Path) -> list[Row]:
    """Rows of results/summary.csv, a variant each, dense ones first."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table_of_variants(rows: list[Row]) -> "Table":
    """Sizes, token perplexities with their ratio to the first dense variant's, and accuracies."""
    from rich.table import Table

    from drank.project.tolerance import other_dtypes

    perplexities, accuracies = (
        [c for c in rows[0] if c.startswith(f"{kind}/")] for kind in ("token_perplexity", "acc")
    )
    dense = next((row for row in rows if row["preset"] == "dense"), None)
    table = Table(caption=other_dtypes({"dtype": row["dtype"]} for row in rows if row.get("dtype")))
    table.add_column("variant")
    for heading in ("kept ratio", "megabytes", *perplexities, *accuracies):
        table.add_column(heading.replace("/", "\n").replace("_", " "), justify="right")
    for row in rows:
        sizes = [f"{float(row['kept_ratio']):.3f}", f"{int(row['bytes']) / 1e6:.1f}"]
        figures = [_perplexity(row[column], dense[column] if dense else None) for column in perplexities]
        table.add_row(row["variant"], *sizes, *figures, *(f"{float(row[column]):.3f}" for column in accuracies))
    return table


def _perplexity(value: str, dense: str | None) -> str:
    ratio = f" (x{float(value) / float(dense):.2f})" if dense else ""
    return f"{float(value):.2f}{ratio}"
