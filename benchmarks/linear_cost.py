"""Does the cost of covariances grow linearly in windows and in layers, and is memory flat in windows?

``python -m benchmarks.linear_cost [--picture FILE]``. Random Llamas of hidden size 256 in bfloat16, windows of 512
tokens, two at a time. Times: straight lines through medians. Memory: the peak of a fresh process for each number.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import linregress
from torch import Tensor

from benchmarks.covariance_overhead import collect
from benchmarks.measure import Times, arguments, begin, interleaved, print_table, shown
from drank.language_model.linears import find_linears, shared_inputs

COUNTS = (2, 4, 8, 16)
KINDS = {"none": "inputs", "gaussian": "inputs and gradients"}


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--picture", type=Path, help="where to draw the lines (PNG or SVG)")
    parser.add_argument("--peak", nargs=2, metavar=("WINDOWS", "FISHER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        print_peak(int(asked.peak[0]), asked.peak[1])
        return
    begin(asked)
    models = {n: llama(n) for n in COUNTS}
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
    peaks = {fisher: [peak(n, fisher) for n in COUNTS] for fisher in KINDS}
    print("Peak memory of a process, MiB, 4 layers:\n")
    print_table(
        ["covariances of", *(f"{n} windows" for n in COUNTS)],
        [[kind, *(f"{mib:.0f}" for mib in peaks[fisher])] for fisher, kind in KINDS.items()],
    )
    if asked.picture:
        draw(times, peaks, asked.picture)


def llama(n_layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def windows_of(n: int) -> Tensor:
    return torch.randint(1024, (n, 512), generator=torch.Generator().manual_seed(0))


def run(model: Any, windows: Tensor, fisher: str) -> None:
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, windows[:1, :8])
    collect(model, windows, linears, owners, fisher, batch_windows=2)


def print_peak(n_windows: int, fisher: str) -> None:
    run(llama(4), windows_of(n_windows), fisher)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak(n_windows: int, fisher: str) -> float:
    """MiB."""
    command = [sys.executable, "-m", "benchmarks.linear_cost", "--peak", str(n_windows), fisher]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def draw(times: Times, peaks: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, against in zip(figure.subplots(1, 3), ("windows", "layers", "memory"), strict=True):
        for fisher, kind in KINDS.items():
            if against == "memory":
                axes.plot(COUNTS, peaks[fisher], "o-", label=kind)
                axes.set(xlabel="windows", ylabel="peak of the process, MiB")
            else:
                axes.plot(
                    COUNTS, [statistics.median(times[f"{against} {fisher} {n}"]) for n in COUNTS], "o-", label=kind
                )
                axes.set(xlabel=against, ylabel="seconds")
        axes.set(ylim=(0, None), xlim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
