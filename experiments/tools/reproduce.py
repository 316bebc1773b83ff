"""``python -m experiments.tools.reproduce NAME``: what an experiment will take, which published figures it reached."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from drank.cli.options import CommandError, Root
from drank.cli.pipeline import reproduce as repro
from drank.project.command import run_app
from drank.project.params import read_params
from experiments.tools.copies import FOLDER, prepare
from experiments.tools.costs import Cost, Size, costs, sizes
from experiments.tools.published import Finding, compare, document, outcome, read_published, read_results

A100 = (312.0, 19.5)  # TFLOP/s of its data sheet, dense, tensor cores
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MARKS = {"reached": "[green]reached[/]", "not run": "[yellow]not run[/]"}


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="An experiment, such as llama-7b: a file of experiments/.")],
    variants: Annotated[list[str] | None, typer.Argument(help="Only these variants; all that were published.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Run it first, in experiments/NAME (needs a GPU).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will take: sizes, memory, disk, hours.")
    ] = False,
    bf16: Annotated[float, typer.Option(help="--dry-run: TFLOP/s of matrix products in bfloat16.", min=0)] = A100[0],
    float64: Annotated[float, typer.Option(help="--dry-run: the same in float64.", min=0)] = A100[1],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of the table.")] = False,
    root: Root = Path(),
) -> None:
    """Compare an experiment with what was published; exit status 0 only if every figure asked for was reached."""
    published = read_published(root, name)
    compare(published, {}, variants or ())  # a name that nothing was published of is refused before hours of running
    if dry_run:
        params, shape = read_params(root / FOLDER / f"{name}.yaml"), published.config.shape(name)
        spent = costs(params, shape, published.test_tokens, _speed("bf16", bf16), _speed("float64", float64))
        _print(table_of_sizes(sizes(params, shape)), table_of_costs(spent))
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


def table_of_sizes(sizes: list[Size]) -> Table:
    table = Table()
    for heading in ("variant", "kept", "parameters", "GB"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for size in sizes:
        table.add_row(size.variant, f"{size.size_ratio:g}", f"{size.parameters:,}", f"{size.n_bytes / 1e9:.2f}")
    return table


def table_of_costs(costs: list[Cost]) -> Table:
    """Stages one after the other, and all of them: the highest memory, the sums of disk and hours."""
    table = Table()
    table.add_column("stage")
    for heading in ("memory, GB", "disk, GB", "hours"):
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(cost.stage, *(_number(n) for n in (cost.memory / 1e9, cost.disk / 1e9, cost.hours)))
    table.add_section()
    disk, hours = sum(cost.disk for cost in costs), sum(cost.hours for cost in costs)
    table.add_row("all", *(_number(n) for n in (max(cost.memory for cost in costs) / 1e9, disk / 1e9, hours)))
    return table


def _number(value: float) -> str:
    return f"{value:.3g}" if 0 < value < 1000 else f"{value:.0f}" if value else "-"


def _speed(option: str, teraflops: float) -> float:
    if not teraflops:
        raise CommandError(f"--{option} = 0: a speed in TFLOP/s is above 0")
    return teraflops * 1e12


def _print(*tables: Table) -> None:
    # In a log file, where the width is unknown, the tables must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    run_app(app)
