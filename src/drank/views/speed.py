"""Figures of ``drank bench`` as a table and a picture. Takes its document; knows no files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

# Unit that people read, its size in the unit that is measured, decimals, whether less is better.
SHOWN = {
    "prefill": ("tokens/s", 1.0, 0, False),
    "decode": ("tokens/s", 1.0, 1, False),
    "first_token": ("ms", 1e-3, 0, True),
    "forward_only": ("tokens/s", 1.0, 0, False),
    "memory": ("MB", 1e6, 0, True),
    "disk": ("MB", 1e6, 1, True),
}
MEMORY = {
    "cpu": "growth of the peak resident memory of a process that loads the model and generates, without libraries",
    "cuda": "peak of what torch allocated on the device in a process that loads the model and generates",
}


def table(results: Mapping[str, Any]) -> "Table":
    """A row per model: ratio to the reference, and below it the figure itself."""
    from rich.table import Table

    sheet = Table(show_lines=True)
    sheet.add_column("model", overflow="fold")
    for figure, (unit, *_) in SHOWN.items():
        sheet.add_column(f"{figure.replace('_', ' ')}\n{unit}", justify="right")
    for name, figures in results["models"].items():
        sheet.add_row(name, *(_cell(figures[figure], figure) for figure in SHOWN))
    return sheet


def _cell(value: Mapping[str, Any], figure: str) -> str:
    _, scale, decimals, _ = SHOWN[figure]
    ratio = value["over_reference"]
    between = f" \\[{ratio['lower']:.2f}, {ratio['upper']:.2f}]" if len(value["samples"]) > 1 else ""
    return f"x{ratio['median']:.2f}{between}\n{value['median'] / scale:,.{decimals}f}"


def caption(results: Mapping[str, Any]) -> str:
    """How to read the table, and what its figures depend on."""
    conditions, here = results["conditions"], results["environment"]
    return (
        f"x: ratio to {results['reference']} within a round, median [quartiles] of {conditions['repeats']} rounds; "
        f"below it the median. For tokens/s more is better, for the others less.\n"
        f"Prompt of {conditions['prompt_tokens']} tokens, {conditions['new_tokens']} new ones, greedy, batch 1; "
        f"forward only: {conditions['batch_size']} windows at once, no cache, all logits.\n"
        f"Memory: {MEMORY[conditions['device'].partition(':')[0]]}.\n"
        f"{here['device']} ({conditions['device']}), {conditions['threads']} threads, {conditions['dtype']}, "
        f"load {here['load_average']:.1f} on {here['cpus']} CPUs at the start, torch {here['torch']}, "
        f"transformers {here['transformers']}"
    )


def bars(results: Mapping[str, Any]) -> "Figure":
    """Ratio to the reference, a panel per figure, a bar per model with the quartiles; blue is better, red worse."""
    from matplotlib.figure import Figure

    names = list(results["models"])
    canvas = Figure(figsize=(2.2 * len(SHOWN) + 1, 1.2 + 0.35 * len(names)), layout="constrained")
    panels = canvas.subplots(1, len(SHOWN), sharey=True)
    for axes, (figure, (unit, _, _, less)) in zip(panels, SHOWN.items(), strict=True):
        for row, name in enumerate(names):
            ratio = results["models"][name][figure]["over_reference"]
            median = ratio["median"]
            better = median <= 1 if less else median >= 1
            errors = [[median - ratio["lower"]], [ratio["upper"] - median]]
            axes.barh(row, median, color="#4c78a8" if better else "#c44e52", height=0.7, xerr=errors, capsize=2)
            axes.text(0.02, row, f"{median:.2f}", va="center", color="white", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        title = f"{figure.replace('_', ' ')}, {unit}\n({'less' if less else 'more'} is better)"
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    conditions, here = results["conditions"], results["environment"]
    told = f"{here['device']}, {conditions['threads']} threads, {conditions['dtype']}"
    canvas.supxlabel(f"ratio to {results['reference']}; {told}", fontsize=9)
    return canvas
