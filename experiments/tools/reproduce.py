"""``python -m experiments.tools.reproduce NAME``: what an experiment will take, which published figures it reached."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from drank.cli.options import CommandError, Root
from drank.cli.pipeline import reproduce as repro
from drank.planning import footprint
from drank.planning.estimate import Cost, Model, costs
from drank.planning.machine import Speed
from drank.project.command import run_app
from drank.project.params import Params, read_params
from experiments.tools.copies import FOLDER, NOT_SHIPPED, prepare
from experiments.tools.published import Finding, compare, document, outcome, read_published, read_results

# FLOP/s of its data sheet, dense, tensor cores; eigenproblems had .21 of the speed of products on two CPU cores
# (docs/performance.md). No GPU was measured, and they are what GPUs are least good at.
A100 = Speed("bfloat16", passes=312e12, float64=19.5e12, eigenproblem=0.21 * 19.5e12)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MARKS = {"reached": "[green]reached[/]", "not run": "[yellow]not run[/]"}


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment, such as llama-7b: a file of experiments/.")],
    variants: Annotated[list[str] | None, typer.Argument(help="Only these variants; all that were published.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Run it first, in experiments/NAME (needs a GPU).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will take: sizes, memory, disk, hours on an A100.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the table.")] = False,
    root: Root = Path(),
) -> None:
    """Compare an experiment with what was published; exit status 0 only if every figure asked for was reached."""
    published = read_published(root, name)
    compare(published, {}, variants or ())  # a name that nothing was published of is refused before hours of running
    if dry_run:
        params, model = read_params(root / FOLDER / f"{name}.yaml"), published.model(name)
        spent = costs(params, model, published.test_tokens // params.sampling.window_length)
        _print(table_of_sizes(params, model, spent), table_of_costs(spent))
        return
    if run:
        file = f"{prepare(root, name)}/dvc.yaml"
        repro(root, [f"{file}:evaluation@{variant}" for variant in variants or ()] or [file])
    findings = compare(published, read_results(root, name), variants or ())
    if as_json:
        typer.echo(document(findings))
    else:
        _print(table_of_findings(findings))
    found = list(outcome(findings).values())
    counts = {verdict: found.count(verdict) for verdict in ("reached", "missed", "not run")}
    if counts["reached"] < len(found):
        said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        raise CommandError(f"{name}: of {len(found)} published figures {said}")


def table_of_findings(findings: list[Finding]) -> Table:
    """Published, ours, ratio and verdict; a line for every source."""
    table = Table()
    for heading in ("variant", "figure", "source", "verdict"):
        table.add_column(heading, overflow="fold")
    for heading in ("published", "ours", "ratio", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in findings:
        verdict = MARKS.get(found.verdict, f"[bold red]missed[/], {found.verdict}")
        row = [found.variant, found.metric.removeprefix("token_"), found.source, verdict, f"{found.published:g}"]
        ours = ["", ""] if found.ours is None else [f"{found.ours:.4g}", f"{found.ours / found.published:.3f}"]
        tolerance = f"{found.tolerance:g}" if found.metric.startswith("acc") else f"{found.tolerance:.1%}"
        table.add_row(*row, *ours, tolerance)
    return table


def table_of_sizes(params: Params, model: Model, found: Mapping[str, Cost]) -> Table:
    """Variants as they will be, as if every size ratio were met exactly."""
    table = Table()
    for heading in ("variant", "kept", "parameters", "GB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    whole = footprint.model_parameters(model.shape)
    for name, variant in params.variants.items():
        left_out = whole - footprint.compressed_parameters(model.shape, variant.ratio)
        cells = f"{round(whole * model.parameters) - left_out:,}", f"{found[f'compression@{name}'].disk / 1e9:.2f}"
        table.add_row(name, f"{variant.ratio:g}", *cells)
    return table


def totals(found: Mapping[str, Cost]) -> dict[str, tuple[float, float, float]]:
    """By step, and for all of them: the highest memory and the sum of what is written, in bytes, and hours."""
    steps: dict[str, list[Cost]] = {}
    for stage, cost in found.items():
        if (step := stage.partition("@")[0]) not in NOT_SHIPPED:
            steps.setdefault(step, []).append(cost)
    steps["all"] = [cost for costs in steps.values() for cost in costs]
    return {
        step: (max(c.memory for c in costs), sum(c.disk for c in costs), sum(c.seconds(A100) for c in costs) / 3600)
        for step, costs in steps.items()
    }


def table_of_costs(found: Mapping[str, Cost]) -> Table:
    table = Table()
    table.add_column("step")
    for heading in ("memory, GB", "disk, GB", "hours"):
        table.add_column(heading, justify="right")
    for step, (memory, disk, hours) in totals(found).items():
        table.add_row(step, *(_number(n) for n in (memory / 1e9, disk / 1e9, hours)))
    return table


def _number(value: float) -> str:
    return f"{value:.3g}" if 0 < value < 1000 else f"{value:.0f}" if value else "-"


def _print(*tables: Table) -> None:
    # In a log file, where the width is unknown, the tables must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    run_app(app)
