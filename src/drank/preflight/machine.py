"""Disk and memory of this machine against what the stages will take."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from drank.planning.estimate import Cost
from drank.preflight.facts import Facts, Finding
from drank.project.params import Healing

PROCESS = 1e9  # bytes of a process beside what is counted, about as measured of the default model (docs/performance.md)
# What makes a stage smaller, on the disk and in memory.
SMALLER = {
    "raw": "a smaller model",
    "covariance": "fewer sampling.calibration_seeds or covariance.targets",
    "spectrum": "fewer keys in section spectrum, or fewer cuts in units block",
    "compression": "fewer variants",
    "release": "fewer variants",
}
LIGHTER = {
    "raw": "a machine with more memory",
    "covariance": "smaller covariance.batch_windows, covariance.offload: true, fewer covariance.processes",
    "spectrum": "fewer covariance.processes, units matrix in the place of block",
    "compression": "smaller healing.batch_windows where a variant is healed",
    "evaluation": "smaller evaluation.batch_windows, fewer evaluation.processes",
}


def disk(facts: Facts) -> Iterator[Finding]:
    """Whether what stages will write fits: once where outputs are links to DVC's cache, twice where they are copies."""
    linked = has_links(facts.root)
    needed = {name: cost.disk * (1 if linked else 2) for name, cost in facts.costs.items()}
    needed = {name: n for name, n in needed.items() if not (linked and name.startswith("release@"))}  # of compression
    free = float(shutil.disk_usage(facts.root).free)
    if (total := sum(needed.values())) > free:
        largest = max(needed, key=lambda name: needed[name])
        copies = "" if linked else " (half of it DVC's copy: `dvc config cache.type hardlink,copy`)"
        yield Finding(
            "error" if total > 1.5 * free else "warning",
            f"disk: about {gb(total)} will be written{copies}, and {gb(free)} are free in {facts.root.resolve()}; most "
            f"is {largest}: {SMALLER[largest.partition('@')[0]]}",
        )


def has_links(root: Path) -> bool:
    """Whether DVC's outputs are links to its cache, by the project's configuration."""
    here = root.absolute()
    folder = next((place / ".dvc" for place in (here, *here.parents) if (place / ".dvc").is_dir()), here)
    files = [file for file in (folder / "config", folder / "config.local") if file.is_file()]
    return any(re.search(r"^\s*type *=.*(hardlink|symlink)", file.read_text(), re.MULTILINE) for file in files)


def memory(facts: Facts) -> Iterator[Finding]:
    """Whether what the largest stage of each kind holds fits into the memory of its device."""
    costs = facts.costs
    passes = ("covariance", "spectrum", "evaluation")
    cuda = {name: cost.on for name, cost in costs.items() if cost.on.device == "cuda"}
    on_gpu = {name for name, on in cuda.items() if name.startswith(passes) or isinstance(on, Healing)}
    gpu = gpu_memory() if on_gpu else None
    if on_gpu and gpu is None:
        yield Finding("cannot say", "memory of the GPU: nvidia-smi does not tell it")
    host = min(float(psutil.virtual_memory().total), memory_limit())
    for step, fix in LIGHTER.items():
        held = {name: held_by(cost) for name, cost in costs.items() if name.partition("@")[0] == step}
        if not held or not max(held.values()):
            continue
        name = max(held, key=lambda name: held[name])
        total = host if name not in on_gpu else gpu
        if total and held[name] > 0.9 * total:
            yield Finding(
                "error" if held[name] > 1.5 * total else "warning",
                f"memory: {name} holds about {gb(held[name])}, and there are {gb(total)} here: {fix}",
            )


def held_by(cost: Cost) -> float:
    return getattr(cost.on, "processes", 1) * (cost.memory + PROCESS) if cost.memory else 0.0


def gpu_memory() -> float | None:
    """Bytes of the smallest GPU here; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=1).stdout
        return min(float(line) for line in told.split()) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def memory_limit() -> float:
    """Bytes that a container may have."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return float("inf")


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e12 else f"{n_bytes / 1e9:,.0f} GB"
