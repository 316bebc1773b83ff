"""``drank diff``: what differs between two variants, model folders or git revisions."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import Root, console, variants

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NOTHING = "–"
LISTED = 3  # names shown of a long list
HEADINGS = {"a": "A", "b": "B", "change": "B - A", "ratio": "B / A"}


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A variant of params.yaml, the folder of a model, a git revision, or an experiment.",
            autocompletion=variants,
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.", autocompletion=variants)],
    root: Root = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document instead of tables.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the change of ranks by layer and kind into this PNG file.", dir_okay=False)
    ] = None,
) -> None:
    """Show what differs between A and B: parameters, metrics, ranks and channels.

    A name is tried as the folder of a model, then as a variant, then as a revision. The variant of one side is looked
    for on the other; of two revisions, all that both have are compared. Nothing is checked out or run. The exit status
    is 0 whether or not there are differences.
    """
    from drank.views.compared import compare_targets

    document = compare_targets(root, a, b)
    if picture is not None:
        from drank.project.files import write_bytes
        from drank.views.difference import heat_map
        from drank.views.pictures import png

        write_bytes(picture, png(heat_map(document["variants"].values())))
    if as_json:
        typer.echo(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False))
        return
    terminal = console()
    for part in rendered(document):
        terminal.print(part)


def rendered(document: Mapping[str, Any]) -> "Iterator[RenderableType]":
    """Every part of the report, variant by variant."""
    yield from _only(document)
    for found in document["variants"].values():
        yield f"A  {found['a']}\nB  {found['b']}"
        if found["empty"]:
            yield "no difference"
        yield from (_table(name, found[name]) for name in ("parameters", "figures") if found[name])
        if any(row["n_changed"] for row in found["kinds"].values()):
            yield _table("ranks and channels", found["kinds"])
        yield from _only(found)
        yield from (f"note: {remark}" for remark in found["remarks"])
        yield ""


def _only(found: Mapping[str, Any]) -> Iterator[str]:
    for side in "ab":
        if names := found[f"only_{side}"]:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            yield f"only in {side.upper()}: {', '.join(names[:LISTED])}{more}"


def _table(heading: str, rows: Mapping[str, Mapping[str, Any]]) -> "Table":
    """A table of rows by name, with a column per key."""
    from rich.table import Table

    table = Table(heading)
    for key in next(iter(rows.values())):
        table.add_column(HEADINGS.get(key, key.replace("_", " ")), justify="right", overflow="fold")
    for name, row in rows.items():
        table.add_row(name, *map(_cell, row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"
