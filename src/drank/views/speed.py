"""Figures of ``drank bench`` as a table. Takes its document; knows no files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# By figure: the unit that people read, its size in the unit that is measured, and decimals.
SHOWN = {
    "prefill": ("tokens/s", 1.0, 0),
    "decode": ("tokens/s", 1.0, 1),
    "first_token": ("ms", 1e-3, 0),
    "forward_only": ("tokens/s", 1.0, 0),
    "memory": ("MB", 1e6, 0),
    "disk": ("MB", 1e6, 1),
}


def table(results: Mapping[str, Any]) -> "Table":
    """A row per model: ratio to the reference, and below it the figure itself."""
    from rich.table import Table
    from rich.text import Text

    sheet = Table(show_lines=True)
    sheet.add_column("model", overflow="fold")
    for figure, (unit, *_) in SHOWN.items():
        sheet.add_column(f"{figure.replace('_', ' ')}\n{unit}", justify="right")
    for name, figures in results["models"].items():
        sheet.add_row(Text(name), *(_cell(figures[figure], *row) for figure, row in SHOWN.items()))
    return sheet


def _cell(value: Mapping[str, Any], unit: str, scale: float, decimals: int) -> str:
    ratio = value["over_reference"]
    between = f" [{ratio['lower']:.2f}, {ratio['upper']:.2f}]" if len(value["samples"]) > 1 else ""
    return f"x{ratio['median']:.2f}{between}\n{value['median'] / scale:,.{decimals}f}"


def caption(results: Mapping[str, Any]) -> str:
    """How to read the table, and what its figures depend on."""
    conditions, here = results["conditions"], results["environment"]
    memory = "torch's own on the device" if conditions["device"] == "cuda" else "growth of the peak resident memory"
    return (
        f"x: ratio to {results['reference']} within a round, median [quartiles] of {conditions['repeats']} rounds; "
        f"below it the median. For tokens/s more is better, for the others less.\n"
        f"Prompt of {conditions['prompt_tokens']} tokens, {conditions['new_tokens']} new ones, greedy, batch 1; "
        f"forward only: {conditions['batch_size']} windows at once, no cache, all logits.\n"
        f"Memory: {memory}, while a model loads and generates, without libraries.\n"
        f"{here['device']} ({conditions['device']}), {conditions['threads']} threads, {conditions['dtype']}, "
        f"load {here['load_average']:.1f} on {here['cpus']} CPUs at the start, torch {here['torch']}, "
        f"transformers {here['transformers']}"
    )
