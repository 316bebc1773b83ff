"""The tiny pipeline as on other people's computers: the same bytes where they are promised, and else how far off.

``python -m tests.faults.determinism`` makes a small project and builds it again in every setting below, in a fresh
folder without a cache; it prints a row per setting. Promises are in docs/determinism.md.

    bytes       settings under which ``data/``, ``results/`` and ``dvc.lock`` must be the same bytes: ``dvc repro``
    kernels     settings that imitate another CPU, or take other threads: the stages alone, and how far they are off
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer

from drank.project.files import read_json, read_tensors
from tests.faults import campaign
from tests.faults.campaign import DVC, contents

VARIANTS = {"d-rank-80": "input", "kfac-80": "kfac"}


@dataclass(frozen=True)
class Setting:
    """Where and how a project is built.

    Attributes:
        environment: variables beside the usual ones.
        folder: the project's, in an empty folder.
        umask: of the process.
        n_cpus: that the process may use; all of them where None.
        reverse: files are created in reverse order, which is the order in which some file systems list them.
        threads: in the sections of params.yaml.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = "project"
    umask: int = 0o022
    n_cpus: int | None = None
    reverse: bool = False
    threads: int = 1


THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
BYTES = {
    "as it was": Setting(),
    "C locale": Setting(
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Kiritimati"}
        | {"PYTHONHASHSEED": "1"},
        folder="deep/" * 12 + "my project", umask=0o077, n_cpus=1,
    ),
    "not ASCII": Setting(
        {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "TZ": "America/St_Johns", "PYTHONHASHSEED": "4242"} | THREADS,
        folder="dé pöt/project", umask=0, reverse=True,
    ),
}  # fmt: skip
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
KERNELS = {
    "2 threads": Setting({"OMP_NUM_THREADS": "2"}, threads=2),
    "torch without AVX": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "torch with AVX2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "oneDNN with SSE 4.1": Setting({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "oneDNN with AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "MKL for any CPU": Setting({"MKL_CBWR": "COMPATIBLE"}),
    "OpenBLAS for Haswell": Setting({"OPENBLAS_CORETYPE": "Haswell"}),
    "an old CPU": Setting(OLD | {"OPENBLAS_CORETYPE": "Nehalem"}),
}


def sown(project: Path, place: Path, setting: Setting) -> Path:
    """Sources of a project, without its outputs, in a folder of the setting."""
    root = place / setting.folder
    root.mkdir(parents=True)
    names = ("params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", "source", "stages", "src")
    files = [f for name in names for f in (project / name, *(project / name).rglob("*")) if f.is_file()]
    for file in sorted((f for f in files if "__pycache__" not in f.parts), reverse=setting.reverse):
        copy = root / file.relative_to(project)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("threads: 1\n", f"threads: {setting.threads}\n"))
    return root


def run(root: Path, setting: Setting, *command: str) -> None:
    """A command in the project, as the setting says."""
    allowed = sorted(os.sched_getaffinity(0))[: setting.n_cpus]
    limited = ["taskset", "-c", ",".join(map(str, allowed))] if setting.n_cpus and shutil.which("taskset") else []
    campaign.run(root, *limited, *command, quick=False, umask=setting.umask, **setting.environment)


def built(project: Path, place: Path, setting: Setting, by_dvc: bool = False) -> Path:
    """The stages of some variants in the setting, in one process; or the whole pipeline by DVC, without a cache."""
    root = sown(project, place, setting)
    stages = (sys.executable, "-m", "tests.faults.determinism", "--here")
    # With git, since DVC then has a .gitignore beside its outputs, which counts in a folder that is a dependency.
    whole = (("git", "init", "-q"), (*DVC, "init", "-q"), (*DVC, "repro"))
    for command in whole if by_dvc else (stages,):
        run(root, setting, *command)
    return root


def run_stages() -> None:
    """Every stage but the report, for some variants, in the current folder."""
    from stages import allocation, compression, covariance, evaluation, raw, release, sampling, spectrum

    raw.main()
    sampling.main()
    covariance.main("0")
    for variant, key in VARIANTS.items():
        spectrum.main(key)
        allocation.main(variant)
        compression.main(variant)
        evaluation.main(variant)
        release.main(variant)


def differing(project: Path, root: Path) -> list[str]:
    """Files of ``root`` that are not the same bytes in ``project``, and such as are there alone."""
    before, after = contents(project), contents(root)
    return sorted(name for name, digest in after.items() if before.get(name) != digest)


def moved(project: Path, root: Path) -> dict[str, float]:
    """How far the variants of ``VARIANTS`` are apart in two projects of the same parameters.

    Returns:
        covariance: largest relative distance, in the Frobenius norm, of a covariance.
        singular_values: largest distance of a singular value, over the largest of its matrix.
        ranks: share of units of which form or rank differ.
        objective: largest relative distance of the loss that an allocation expects.
        perplexity: largest relative distance of a token perplexity.
    """

    def both(read, path: str) -> tuple:
        return read(project / path), read(root / path)

    files = [str(file.relative_to(root)) for file in (root / "data/covariance/0").rglob("*.safetensors")]
    pairs = [[tensors["covariance"] for tensors in both(read_tensors, file)] for file in files]
    spectra = [both(read_tensors, f"data/spectrum/{key}/singular_values.safetensors") for key in VARIANTS.values()]
    allocations = [both(read_json, f"data/allocation/{variant}.json") for variant in VARIANTS]
    units = [pair for a, b in allocations for pair in zip(a["units"], b["units"], strict=True)]
    figures = [both(read_json, f"results/{variant}.json") for variant in VARIANTS]
    names = [name for name in figures[0][0] if name.startswith("token_perplexity/") and "stderr" not in name]
    return {
        "covariance": max(float((a - b).norm() / a.norm()) for a, b in pairs),
        "singular_values": max(float((a[n] - b[n]).abs().max() / a[n].max()) for a, b in spectra for n in a),
        "ranks": sum((a["form"], a["rank"]) != (b["form"], b["rank"]) for a, b in units) / len(units),
        "objective": max(_apart(a["objective"]["value"], b["objective"]["value"]) for a, b in allocations),
        "perplexity": max(_apart(a[name], b[name]) for a, b in figures for name in names),
    }


def _apart(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else abs(b)


def main() -> None:
    if "--here" in sys.argv:
        run_stages()
        return
    only = {"choices": ("bytes", "kernels"), "help": "one of the two tables"}
    with campaign.campaign(__doc__, 1, only=only) as work:
        typer.echo(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs")
        project = work.project()
        for name, setting in (BYTES | KERNELS).items():
            if work.asked.only == ("kernels" if name in BYTES else "bytes"):
                continue
            root = built(project, Path(tempfile.mkdtemp(dir=work.scratch)), setting, by_dvc=name in BYTES)
            off = differing(project, root)
            far = moved(project, root) if name in KERNELS else ", ".join(off)
            typer.echo(f"{name:22} {len(contents(root)):4} files, {len(off)} differ: {far or 'none'}")


if __name__ == "__main__":
    main()
