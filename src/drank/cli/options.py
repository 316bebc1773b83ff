"""Shared by several commands."""

from pathlib import Path
from typing import Annotated

import typer

Root = Annotated[
    Path, typer.Option(help="The folder that holds dvc.yaml and params.yaml.", file_okay=False, exists=True)
]


class CommandError(ValueError):
    """A program that a command runs has failed; it has said why on the terminal itself."""
