"""Does the cost of covariances grow linearly in windows and in layers?

``python -m benchmarks.linear_cost [--picture FILE]``. Random Llamas of hidden size 256 in bfloat16, windows of 512
tokens, two at a time. Straight lines through medians. Memory is the question of ``benchmarks.memory``.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import linregress
from torch import Tensor

from benchmarks.covariance_overhead import collect
from benchmarks.measure import Times, arguments, begin, interleaved, llama, print_table, shown
from drank.model.linears import find_linears, shared_inputs

COUNTS = (2, 4, 8, 16)
KINDS = {"none": "inputs", "gaussian": "inputs and gradients"}


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--picture", type=Path, help="where to draw the lines (PNG or SVG)")
    asked = parser.parse_args()
    begin(asked)
    models = {n: llama(n, 256) for n in COUNTS}
    runs = {}
    for fisher in KINDS:
        runs |= {f"windows {fisher} {n}": partial(run, models[4], windows_of(n), fisher) for n in COUNTS}
        runs |= {f"layers {fisher} {n}": partial(run, models[n], windows_of(4), fisher) for n in COUNTS}
    times = interleaved(runs, asked.rounds)
    rows = []
    for against in ("windows", "layers"):
        for fisher, kind in KINDS.items():
            series = [times[f"{against} {fisher} {n}"] for n in COUNTS]
            fit = linregress(COUNTS, [statistics.median(s) for s in series])
            line = [f"{fit.slope:.4f}", f"{fit.intercept:.3f}", f"{fit.rvalue**2:.4f}"]
            rows.append([against, kind, *map(shown, series), *line])
    print_table(["against", "covariances of", *map(str, COUNTS), "slope", "intercept", "R²"], rows)
    if asked.picture:
        draw(times, asked.picture)


def windows_of(n: int) -> Tensor:
    return torch.randint(1024, (n, 512), generator=torch.Generator().manual_seed(0))


def run(model: Any, windows: Tensor, fisher: str) -> None:
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, windows[:1, :8])
    collect(model, windows, linears, owners, fisher, batch_windows=2)


def draw(times: Times, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3), layout="constrained")
    for axes, against in zip(figure.subplots(1, 2), ("windows", "layers"), strict=True):
        for fisher, kind in KINDS.items():
            medians = [statistics.median(times[f"{against} {fisher} {n}"]) for n in COUNTS]
            axes.plot(COUNTS, medians, "o-", label=kind)
        axes.set(xlabel=against, ylabel="seconds", ylim=(0, None), xlim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
