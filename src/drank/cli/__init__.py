"""The command ``drank``. Commands import what they need when they are called, so that ``--help`` is quick."""

from typing import Annotated

import typer

from drank import __version__
from drank.cli import audit, bench, check, diff, export, params, pipeline, promote
from drank.project.command import quieten_libraries, run_app

commands = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    pipeline.run, pipeline.track, audit.audit, check.check, diff.diff, bench.bench, params.params, export.export,
    promote.promote,
):  # fmt: skip
    commands.command()(command)


def app() -> None:
    """The console script. A user's error ends as it does in a stage: in one message and exit status 1."""
    quieten_libraries()
    run_app(commands)


def _say_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"drank {__version__}")
        raise typer.Exit
    return asked


@commands.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which version this is.")
    ] = False,
) -> None:
    """Compress a language model by truncated SVD, compare the variants of params.yaml, and say what made a model."""
