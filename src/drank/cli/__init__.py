"""The command ``drank``. Commands import what they need when they are called, so that ``--help`` is quick."""

import typer

from drank.cli import audit, bench, check, diff, export, params, pipeline, promote
from drank.project.command import quieten_libraries, run_app

commands = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (
    pipeline.run, pipeline.track, audit.audit, check.check, diff.diff, bench.bench, params.params, export.export,
    promote.promote,
):  # fmt: skip
    commands.command()(command)


def app() -> None:
    """The console script. A user's error ends as it does in a stage: in one message and exit status 1."""
    quieten_libraries()
    run_app(commands)


@commands.callback()
def describe() -> None:
    """Compress a language model by truncated SVD, compare the variants of params.yaml, and say what made a model."""
