"""Disk and memory of this machine against what the stages will take."""

import shutil
from contextlib import suppress
from pathlib import Path

import psutil

from drank.preflight.facts import Facts, Finding, Findings
from drank.project.dvc import dvc_folder, setting

PROCESS = 1e9  # bytes of a process beside what is counted, about as measured of the default model (docs/performance.md)
# Ways to make a stage smaller, on the disk and in memory.
FIXES = {
    "raw": ("a smaller model", "a machine with more memory"),
    "covariance": (
        "fewer sampling.calibration_seeds or covariance.targets",
        "smaller covariance.batch_windows, covariance.offload: true, fewer covariance.processes",
    ),
    "spectrum": ("fewer keys in section spectrum, or fewer cuts", "units matrix, or fewer covariance.processes"),
    "compression": ("fewer variants", "smaller healing.batch_windows where a variant is healed"),
    "evaluation": ("", "smaller evaluation.batch_windows, fewer evaluation.processes"),
    "release": ("fewer variants", ""),
}


def disk(facts: Facts) -> Findings:
    """Outputs against the free disk: once where they are links to DVC's cache, twice where they are copies."""
    cache_type = setting(dvc, "type") if (dvc := dvc_folder(facts.root)) else None
    linked = cache_type is not None and ("hardlink" in cache_type[1] or "symlink" in cache_type[1])
    needed = {name: cost.disk * (1 if linked else 2) for name, cost in facts.costs.items()}
    needed = {name: n for name, n in needed.items() if not (linked and name.startswith("release@"))}  # links, too
    free = float(shutil.disk_usage(facts.root).free)
    if (total := sum(needed.values())) > free:
        largest = max(needed, key=lambda name: needed[name])
        copies = "" if linked else " (half of it DVC's copy: `dvc config cache.type hardlink,copy`)"
        yield Finding(
            "error" if total > 1.5 * free else "warning",
            f"disk: about {gb(total)} will be written{copies}, and {gb(free)} are free in {facts.root.resolve()}; most "
            f"is {largest}: {FIXES[largest.partition('@')[0]][0]}",
        )


def memory(facts: Facts) -> Findings:
    """The largest stage of each kind against this machine's memory."""
    total = float(psutil.virtual_memory().total)
    with suppress(OSError, ValueError):  # no container, or one without a limit, "max"
        total = min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    held = {name: getattr(cost.on, "processes", 1) * (cost.memory + PROCESS) for name, cost in facts.costs.items()}
    on_gpu = {name for name, cost in facts.costs.items() if cost.on.device == "cuda" and name != "raw"}
    if on_gpu:
        yield "cannot say", "memory of the GPU: compare it with `nvidia-smi`"
    for step, (_, fix) in FIXES.items():
        names = [name for name in held.keys() - on_gpu if name.partition("@")[0] == step]
        name = max(names, key=lambda name: held[name], default=None)
        if name and held[name] > 0.9 * total:
            yield Finding(
                "error" if held[name] > 1.5 * total else "warning",
                f"memory: {name} holds about {gb(held[name])}, and there are {gb(total)} here: {fix}",
            )


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e12 else f"{n_bytes / 1e9:,.0f} GB"
