"""Bounds of the memory of collecting covariances, with the whole model there and with one block at a time.

``python -m benchmarks.memory [--picture FILE]``, on Linux. Random Llamas in bfloat16, windows of 256 tokens, two at a
time; the stage's own code in a fresh process for each figure, whose peak (VmHWM) is read when it ends.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import llama, print_table
from drank.project.files import TensorFolder, scratch_folder

AXES = {"layers": (2, 4, 8, 16), "width": (128, 256, 512, 1024), "windows": (2, 4, 8, 16)}
BASE = {"layers": 4, "width": 512, "windows": 4}
LINES = [("none", False), ("none", True), ("gaussian", False), ("gaussian", True)]
KINDS = {"none": "inputs", "gaussian": "inputs and gradients"}
Peaks = dict[tuple[str, str, bool], list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="processes for each figure; the least peak counts")
    parser.add_argument("--picture", type=Path, help="where to draw the lines (PNG or SVG)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak:
        folder, windows, fisher, offload = asked.peak
        print(peak_here(Path(folder), int(windows), fisher, offload == "True"))
        return
    peaks: Peaks = {(axis, *line): [] for axis in AXES for line in LINES}
    for axis, counts in AXES.items():
        for n in counts:
            sizes = BASE | {axis: n}
            with tempfile.TemporaryDirectory() as folder:
                llama(sizes["layers"], sizes["width"]).save_pretrained(folder)
                for line in LINES:
                    runs = [peak(folder, sizes["windows"], *line) for _ in range(asked.rounds)]
                    peaks[axis, *line].append(min(runs))
    for axis, counts in AXES.items():
        print(f"Peak MiB over {axis}; " + ", ".join(f"{n} {what}" for what, n in BASE.items() if what != axis) + ":\n")
        rows = [[label(*line), *(f"{mib:.0f}" for mib in peaks[axis, *line])] for line in LINES]
        print_table(["covariances of", *map(str, counts)], rows)
    if asked.picture:
        draw(peaks, asked.picture)


def peak(folder: str, n_windows: int, fisher: str, offload: bool) -> float:
    """MiB."""
    command = [sys.executable, "-m", "benchmarks.memory", "--peak", folder, str(n_windows), fisher, str(offload)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def peak_here(model: Path, n_windows: int, fisher: str, offload: bool) -> int:
    """KiB of this process, after the stage's work."""
    from drank.model.offload import load_for_sweeps
    from drank.project.params import Covariance
    from drank.project.processes import Group
    from drank.steps.covariance import collect

    torch.set_num_threads(1)
    params = Covariance(batch_windows=2, threads=1, fisher=fisher, targets=("re:.*",), offload=offload)  # type: ignore[arg-type]
    windows = torch.randint(1024, (n_windows, 256), generator=torch.Generator().manual_seed(0))
    with scratch_folder(model / "covariance") as folder, scratch_folder(model / "scratch") as scratch:
        weights = scratch / "weights" if offload else None
        loaded = load_for_sweeps(model, "float32", "cpu", lambda dtype: [dtype], params.targets, params.ignore, weights)
        collect(loaded, windows, params, Group(), TensorFolder(folder), TensorFolder(scratch))
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def label(fisher: str, offload: bool) -> str:
    return KINDS[fisher] + (", offloaded" if offload else "")


def draw(peaks: Peaks, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (axis, counts) in zip(figure.subplots(1, 3), AXES.items(), strict=True):
        for fisher, offload in LINES:
            style = "o-" if offload else "o:"
            colour = "C0" if fisher == "none" else "C1"
            axes.plot(counts, peaks[axis, fisher, offload], style, color=colour, label=label(fisher, offload))
        axes.set(xlabel=axis, ylabel="peak of the process, MiB", ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
