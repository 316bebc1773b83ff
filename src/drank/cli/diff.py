"""``drank diff``: what differs between two variants, model folders or git revisions."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import Root

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NOTHING = "–"
LISTED = 3  # names shown of a long list


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A variant of params.yaml, the folder of a model, a git revision or experiment, or REVISION:VARIANT.",
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; of a revision, the variants that A has too.")],
    root: Root = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document instead of tables.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the change of ranks by layer and kind into this PNG file.", dir_okay=False)
    ] = None,
) -> None:
    """Show what differs between A and B: parameters, metrics, ranks and channels.

    A name is tried as the folder of a model, then as a variant, then as a revision. Nothing is checked out or run. The
    exit status is 0 whether or not there are differences.
    """
    from drank.views.compared import compare_targets

    document = compare_targets(root, a, b)
    if picture is not None:
        save(picture, document)
    if as_json:
        typer.echo(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False))
        return
    from rich.console import Console

    # On a terminal tables fit themselves to it; in a log file, where the width is unknown, they must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    for part in rendered(document):
        console.print(part)


def save(path: Path, document: dict[str, Any]) -> None:
    """Draw the heat map of what has ranks on both sides into a PNG file.

    Raises:
        DifferenceError: nothing has.
    """
    from drank.project.files import write_bytes
    from drank.views.compared import DifferenceError
    from drank.views.difference import heat_map
    from drank.views.pictures import png

    drawn = [found for found in document["variants"].values() if found["units"]]
    if not drawn:
        raise DifferenceError(
            f"{path}: not drawn: no matrix has a rank on both sides; without --picture, diff says why"
        )
    write_bytes(path, png(heat_map(drawn)))


def rendered(document: dict[str, Any]) -> "Iterable[RenderableType]":
    """Every part of the report, variant by variant."""
    for key in ("only_a", "only_b"):
        if document[key]:
            yield f"only in {key[-1].upper()}: {', '.join(document[key])}\n"
    for found in document["variants"].values():
        yield f"A  {found['a']}\nB  {found['b']}"
        yield from _rendered(found)
        yield ""


def _rendered(found: dict[str, Any]) -> "Iterable[RenderableType]":
    if found["empty"]:
        yield "no difference"
    if parameters := found["parameters"]:
        rows = [(key, pair["a"] or NOTHING, pair["b"] or NOTHING) for key, pair in parameters.items()]
        yield _table(("parameter", "A", "B"), rows, "left")
    if figures := found["figures"]:
        yield _table(("figure", "A", "B", "B - A", "B / A"), _figures(figures))
    if any(row["n_changed"] for row in found["kinds"].values()):
        spans = next(iter(found["kinds"].values()))["mean_change_by_layers"]
        heads = ["rank, or\nchannels", "\nchanged", "\nfull", "\nmean A", "\nmean B"]
        heads += [*(f"layers\n{span}" for span in spans), "\nlargest change", "\nform"]
        yield _table(heads, [_ranks(kind, row) for kind, row in found["kinds"].items()])
        yield "Mean rank of A and of B, mean of B - A in the layers of each third, largest change with its layer."
    for key in ("only_a", "only_b"):
        if names := found[key]:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            yield f"only in {key[-1].upper()}: {', '.join(names[:LISTED])}{more}"
    for remark in found["remarks"]:
        yield f"note: {remark}"


def _figures(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of figures, each with its standard error, which is a figure beside it."""
    nothing: dict[str, Any] = {"a": None, "b": None}
    errors = {name.replace("_stderr/", "/"): pair for name, pair in figures.items() if "_stderr/" in name}
    return [
        (
            name,
            *(_number(pair[side], errors.get(name, nothing)[side]) for side in "ab"),
            NOTHING if pair["change"] is None else _change(pair["change"]),
            NOTHING if pair["ratio"] is None else f"x{pair['ratio']:.3f}",
        )
        for name, pair in figures.items()
        if "_stderr/" not in name
    ]


def _number(value: float | int | None, error: float | int | None) -> str:
    if value is None:
        return NOTHING
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + (f" ± {error:.4f}" if error else "")


def _change(change: float | int) -> str:
    if isinstance(change, int):
        return f"{change:+,}"
    return f"{change:+,.4f}" if abs(change) >= 1e-4 else f"{change:+.1e}"


def _ranks(kind: str, row: dict[str, Any]) -> tuple[str, ...]:
    largest = row["largest"]
    return (
        kind,
        f"{row['n_changed']} of {row['n']}",
        f"{row['full']}",
        f"{row['mean_a']:,.1f}",
        f"{row['mean_b']:,.1f}",
        *(NOTHING if mean is None else f"{mean:+,.1f}" for mean in row["mean_change_by_layers"].values()),
        f"{largest['a']} to {largest['b']}, layer {largest['layer']}" if largest else NOTHING,
        "\n".join(f"{n} {became}" for became, n in row["forms"].items()) or NOTHING,
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], justify: Any = "right") -> "Table":
    from rich.table import Table

    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify=justify if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
