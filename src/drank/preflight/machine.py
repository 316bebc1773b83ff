"""Disk and memory of this machine against what the stages will take."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from drank.preflight.facts import Facts, Finding

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
    """Whether what the largest stage holds fits into this machine's memory."""
    total = min(float(psutil.virtual_memory().total), memory_limit())
    held = {
        name: getattr(cost.on, "processes", 1) * (cost.memory + PROCESS)
        for name, cost in facts.costs.items()
        if cost.memory and (cost.on.device == "cpu" or name == "raw")
    }
    for step in LIGHTER:
        name = max((name for name in held if name.partition("@")[0] == step), key=lambda name: held[name], default=None)
        if name and held[name] > 0.9 * total:
            yield Finding(
                "error" if held[name] > 1.5 * total else "warning",
                f"memory: {name} holds about {gb(held[name])}, and there are {gb(total)} here: {LIGHTER[step]}",
            )


def memory_limit() -> float:
    """Bytes that a container may have."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return float("inf")


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e12 else f"{n_bytes / 1e9:,.0f} GB"
