"""``drank diff``: what differs between two variants, model folders or git revisions."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import Root

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table

    from drank.views.compared import Comparison
    from drank.views.difference import Difference, Kept, KindSummary
    from drank.views.difference import Figure as Number

NOTHING = "–"
LISTED = 3  # names shown of a long list
PANELS_ACROSS = 5


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

    comparison = compare_targets(root, a, b)
    if picture is not None:
        save(picture, comparison)
    if as_json:
        typer.echo(json.dumps(document(comparison), indent=2, sort_keys=True, ensure_ascii=False))
        return
    from rich.console import Console

    # On a terminal tables fit themselves to it; in a log file, where the width is unknown, they must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    for part in rendered(comparison):
        console.print(part)


def rendered(comparison: "Comparison") -> "Iterable[RenderableType]":
    """Every part of the report, variant by variant."""
    for label, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            yield f"only in {label}: {', '.join(names)}\n"
    for difference in comparison.differences.values():
        yield f"A  {difference.a}\nB  {difference.b}"
        yield from _rendered(difference)
        yield ""


def document(comparison: "Comparison") -> dict[str, Any]:
    """The same contents for machines. Matrices and blocks that changed are listed one by one."""
    return {
        "format_version": 1,
        "only_a": list(comparison.only_a),
        "only_b": list(comparison.only_b),
        "variants": {name: _document(difference) for name, difference in comparison.differences.items()},
    }


def heat_map(differences: "Sequence[Difference]") -> "Figure":
    """Change of rank / full rank by layer (down) and kind (across), a panel per comparison; blue is more in B.

    Dots mark the matrices that one side alone keeps dense. Grey was not compared.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Canvas

    columns = min(len(differences), PANELS_ACROSS)
    rows = -(-len(differences) // columns)
    figure = Canvas(figsize=(2.2 + 3.2 * columns, 1 + 5.5 * rows), layout="constrained")
    limit = max((abs(item.share) for difference in differences for item in _kept(difference)), default=0.0) or 1.0
    shades = colormaps["RdBu"].with_extremes(bad="lightgrey")
    for index, difference in enumerate(differences):
        axes = figure.add_subplot(rows, columns, index + 1)
        kept = _kept(difference)
        kinds = list(dict.fromkeys(item.kind for item in kept))
        grid = np.full((max(item.layer for item in kept) + 1, len(kinds)), np.nan)
        for item in kept:
            grid[item.layer, kinds.index(item.kind)] = item.share
        image = axes.imshow(grid, cmap=shades, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        for label, face, edge, became in (
            ("dense in A only", "none", "black", False),
            ("dense in B only", "black", "white", True),
        ):
            dense = [k for k in kept if k.form_a != k.form_b and (k.form_b if became else k.form_a) == "dense"]
            points = [kinds.index(item.kind) for item in dense], [item.layer for item in dense]
            axes.scatter(*points, s=20, facecolors=face, edgecolors=edge, linewidths=0.8, label=label)
        axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds], rotation=90)
        axes.set_title(f"A  {difference.a}\nB  {difference.b}", fontsize=9, loc="left")
        axes.set_ylabel("layer" if index % columns == 0 else "")
    figure.colorbar(image, ax=figure.axes, label="B - A, share of the full rank, or of the channels")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def save(path: Path, comparison: "Comparison") -> None:
    """Draw the heat map of what has ranks on both sides into a PNG file.

    Raises:
        DifferenceError: nothing has.
    """
    from drank.project.files import write_bytes
    from drank.views.compared import DifferenceError
    from drank.views.pictures import png

    drawn = [difference for difference in comparison.differences.values() if _kept(difference)]
    if not drawn:
        raise DifferenceError(
            f"{path}: not drawn: no matrix has a rank on both sides; without --picture, diff says why"
        )
    write_bytes(path, png(heat_map(drawn)))


def _kept(difference: "Difference") -> "tuple[Kept, ...]":
    return (*difference.matrices, *difference.blocks)


def _rendered(difference: "Difference") -> "Iterable[RenderableType]":
    if difference.empty:
        yield "no difference"
    if difference.parameters:
        yield _table(("parameter", "A", "B"), [(p.key, p.a or NOTHING, p.b or NOTHING) for p in difference.parameters])
    if any(figure.change for figure in difference.sizes):
        yield _table(("size", "A", "B", "B - A", "B / A"), [_numbers(figure, True) for figure in difference.sizes])
    errors = {figure.name: figure for figure in difference.metrics if "_stderr/" in figure.name}
    metrics = [figure for figure in difference.metrics if figure.name not in errors]
    if metrics or errors:
        rows = [_numbers(m, "perplexity" in m.name, errors.get(m.name.replace("/", "_stderr/", 1))) for m in metrics]
        yield _table(("metric", "A", "B", "B - A", "B / A"), rows or [_numbers(e, False) for e in errors.values()])
    yield from _ranks(difference)
    for what, names in (
        ("only in A", difference.only_a),
        ("only in B", difference.only_b),
        ("of another shape, so not compared", difference.reshaped),
    ):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            yield f"{what}: {', '.join(names[:LISTED])}{more}"
    for remark in difference.remarks:
        yield f"note: {remark}"


def _ranks(difference: "Difference") -> "Iterable[RenderableType]":
    from drank.views.difference import by_kind, layer_ranges

    kept = _kept(difference)
    if not any(item.changed for item in kept):
        return
    depths = layer_ranges(kept)
    spans = [f"layers\n{_span(depth)}" for depth in depths]
    headings = (
        "rank, or\nchannels",
        "\nchanged",
        "\nfull",
        "\nmean A",
        "\nmean B",
        *spans,
        "\nlargest change",
        "\nform",
    )
    yield _table(headings, [_row(summary) for summary in by_kind(kept, depths)])
    yield "Mean rank of A and of B, mean of B - A in the layers of each third, largest change with its layer."


def _row(summary: "KindSummary") -> tuple[str, ...]:
    largest = summary.largest
    change = f"{largest.a} to {largest.b}, layer {largest.layer}" if largest else NOTHING
    return (
        summary.kind,
        f"{summary.n_changed} of {summary.n}",
        f"{summary.full}",
        f"{summary.mean_a:,.1f}",
        f"{summary.mean_b:,.1f}",
        *(NOTHING if mean is None else f"{mean:+,.1f}" for mean in summary.by_depth),
        change,
        "\n".join(f"{n} {before} to {now}" for (before, now), n in sorted(summary.forms.items())) or NOTHING,
    )


def _numbers(figure: "Number", with_ratio: bool, error: "Number | None" = None) -> tuple[str, ...]:
    change, ratio = figure.change, figure.ratio
    return (
        figure.name,
        _number(figure.a, error.a if error else None),
        _number(figure.b, error.b if error else None),
        NOTHING if change is None else _change(change),
        f"x{ratio:.3f}" if with_ratio and ratio is not None else "",
    )


def _number(value: float | int | None, error: float | int | None) -> str:
    if value is None:
        return NOTHING
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.4f}") + (f" ± {error:.4f}" if error else "")


def _change(change: float | int) -> str:
    if isinstance(change, int):
        return f"{change:+,}"
    return f"{change:+,.4f}" if change == 0 or abs(change) >= 1e-4 else f"{change:+.1e}"


def _span(depth: range) -> str:
    return f"{depth[0]}-{depth[-1]}" if len(depth) > 1 else str(depth[0])


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    from rich.table import Table

    table = Table()
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index and headings[0] != "parameter" else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _document(difference: "Difference") -> dict[str, Any]:
    from dataclasses import asdict

    from drank.views.difference import by_kind, layer_ranges

    kept = _kept(difference)
    depths = layer_ranges(kept)

    def numbers(figure: "Number") -> dict[str, Any]:
        return {"a": figure.a, "b": figure.b, "change": figure.change, "ratio": figure.ratio}

    def summary(row: "KindSummary") -> dict[str, Any]:
        layers = {_span(depth): mean for depth, mean in zip(depths, row.by_depth, strict=True)}
        forms = {f"{before} to {now}": n for (before, now), n in row.forms.items()}
        return {
            "n": row.n, "n_changed": row.n_changed, "mean_a": row.mean_a, "mean_b": row.mean_b, "full": row.full,
            "mean_change_by_layers": layers, "largest": row.largest.name if row.largest else None, "forms": forms,
        }  # fmt: skip

    return {
        "a": difference.a,
        "b": difference.b,
        "empty": difference.empty,
        "parameters": {p.key: {"a": p.a, "b": p.b} for p in difference.parameters},
        "metrics": {figure.name: numbers(figure) for figure in difference.metrics},
        "sizes": {figure.name: numbers(figure) for figure in difference.sizes},
        "kinds": {row.kind: summary(row) for row in by_kind(kept, depths)},
        "matrices": [asdict(item) | {"share": item.share} for item in difference.matrices if item.changed],
        "blocks": [asdict(item) | {"share": item.share} for item in difference.blocks if item.changed],
        "only_a": list(difference.only_a),
        "only_b": list(difference.only_b),
        "reshaped": list(difference.reshaped),
        "remarks": list(difference.remarks),
    }
