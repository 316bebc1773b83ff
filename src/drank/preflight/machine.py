"""This machine against what the stages will take: disk, memory, a GPU."""

import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from drank.planning.facts import Facts
from drank.preflight.finding import Finding
from drank.project.dvc import cache_folder, dvc_folder, setting

PROCESS = 1e9  # bytes of a process beside what is counted, about as measured of the default model (docs/performance.md)
SHARED = ("covariance", "spectrum", "evaluation")  # stages that run in several processes
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


def disk(facts: Facts) -> Iterator[Finding]:
    """Outputs of stages against the free disk: once where they are links to DVC's cache, twice where they are copies;
    where the cache has a disk of its own, once on each."""
    dvc = dvc_folder(facts.root)
    found = setting(dvc, "type") if dvc else None
    linked = found is not None and ("hardlink" in found[1] or "symlink" in found[1])
    places = {existing(facts.root / "data"): 1, existing(cache_folder(facts.root) or facts.root / ".dvc"): 1}
    if len({device_of(place) for place in places}) == 1:
        places = {next(iter(places)): 1 if linked else 2}
    for place, copies in places.items():
        needed = {name: cost.disk * copies for name, cost in facts.left.items()}
        if linked:  # a release is a link to what compression wrote
            needed = {name: n for name, n in needed.items() if not name.startswith("release@")}
        free = float(shutil.disk_usage(place).free)
        if (total := sum(needed.values())) > free:
            largest = max(needed, key=lambda name: needed[name])
            half = " (half of it DVC's copy: `dvc config cache.type hardlink,copy`)" if copies == 2 else ""
            yield Finding(
                "error" if total > 1.5 * free else "warning",
                f"disk: about {gb(total)} will be written{half}, and {gb(free)} are free in {place}; most is "
                f"{largest}: {FIXES[largest.partition('@')[0]][0]}",
            )


def existing(folder: Path) -> Path:
    """The folder itself, behind any links, or the closest one around it that is there."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def device_of(place: Path) -> object:
    return place.stat().st_dev


def memory(facts: Facts) -> Iterator[Finding]:
    """Memory of the largest stage of each kind against this machine's."""
    total = min(float(psutil.virtual_memory().total), memory_limit())
    held = {
        name: (getattr(cost.on, "processes", 1) if name.startswith(SHARED) else 1) * (cost.memory + PROCESS)
        for name, cost in facts.left.items()
    }
    on_gpu = {name for name, cost in facts.left.items() if cost.on.device == "cuda" and not name.startswith("raw")}
    if on_gpu:
        yield Finding("cannot say", "memory of the GPU: compare it with `nvidia-smi`")
    for step, (_, fix) in FIXES.items():
        names = [name for name in held.keys() - on_gpu if name.partition("@")[0] == step]
        name = max(names, key=lambda name: held[name], default=None)
        if name and held[name] > 0.9 * total:
            yield Finding(
                "error" if held[name] > 1.5 * total else "warning",
                f"memory: {name} holds about {gb(held[name])}, and there are {gb(total)} here: {fix}",
            )


def devices(facts: Facts) -> Iterator[Finding]:
    """A GPU that is asked for, where there is none, or none for the torch that is installed."""
    params = facts.params
    sections: dict[str, Any] = {"covariance": params.covariance, "evaluation": params.evaluation}
    sections |= {f"variants.{name}.healing": variant.healing for name, variant in params.variants.items()}
    asked = [f"{name}.device" for name, section in sections.items() if section and section.device == "cuda"]
    torch = find_spec("torch")
    told = Path(torch.origin).with_name("version.py").read_text() if torch and torch.origin else ""
    if asked and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
        yield Finding("error", f"{', '.join(asked)} = cuda, and there is no GPU here (no /dev/nvidiactl); give cpu")
    elif asked and not re.search(r"^(cuda|hip)\b[^=]*= *['\"]", told, re.MULTILINE):
        yield Finding("error", f"{', '.join(asked)} = cuda, and torch is a build for CPUs: install one for your GPU")


def memory_limit() -> float:
    """Bytes that a container may have."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # none, or "max"
        return float("inf")


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e12 else f"{n_bytes / 1e9:,.0f} GB"
