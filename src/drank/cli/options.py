"""Shared by several commands."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Root = Annotated[
    Path, typer.Option(help="The folder that holds dvc.yaml and params.yaml.", file_okay=False, exists=True)
]


def variants(context: typer.Context, incomplete: str) -> list[str]:
    """Names of variants that begin so: what a shell completes. A params.yaml that cannot be read has none to offer."""
    import yaml

    try:
        text = (context.params.get("root") or Path()).joinpath("params.yaml").read_text(encoding="utf-8")
        named = yaml.safe_load(text)["variants"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [name for name in named if str(name).startswith(incomplete)]


class CommandError(ValueError):
    """A program that a command runs has failed; it has said why on the terminal itself."""


def console() -> "Console":
    """Where tables go. On a terminal they fit themselves to it; in a log file, of unknown width, none is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)


def weights_bytes(folder: Path) -> int:
    """Bytes of weights on disk, counted as in results/<variant>.json."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
