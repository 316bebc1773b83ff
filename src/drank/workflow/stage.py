"""How every stage starts: ``run_stage(main)`` under ``if __name__ == "__main__"``."""

import logging
import os
import sys
from collections.abc import Callable

import typer


def run_stage(main: Callable[..., None]) -> None:
    """Run a stage's ``main`` as a command line; what the user can mend ends in one message and exit status 1.

    That is every ``ValueError`` class that drank itself defines (wrong parameters, an unreachable source, a
    damaged file). Any other exception is a bug, here or in a library, and keeps its traceback.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line of several commands with the same promise as :func:`run_stage`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("drank").setLevel(logging.INFO)
    try:
        app()
    except ValueError as error:
        if not type(error).__module__.startswith("drank."):
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


def quieten_libraries() -> None:
    """No telemetry, and no progress bars in a log file; libraries read this when they are imported, later."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
