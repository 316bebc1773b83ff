"""The tiny pipeline as on other people's computers: the same bytes where they are promised, and else how far off.

``python -m tests.faults.determinism`` makes a small project and builds it again in every setting below, in a fresh
folder without a cache; it prints a row a setting. What is promised is in docs/determinism.md.

    bytes       settings under which ``data/``, ``results/`` and ``dvc.lock`` must be the same bytes: ``dvc repro``
    kernels     settings that imitate another CPU, or take other threads: the stages alone, and how far they are off
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import typer

from drank.project.files import file_sha256, read_json, read_tensors
from tests.conftest import REPOSITORY, reproduce

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


BYTES = {
    "as it was": Setting(),
    "C locale": Setting(
        {
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "TZ": "Pacific/Kiritimati",
            "PYTHONHASHSEED": "1",
        },
        folder="deep/" * 12 + "my project",
        umask=0o077,
        n_cpus=1,
    ),
    "not ASCII": Setting(
        {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "TZ": "America/St_Johns", "PYTHONHASHSEED": "4242"}
        | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2"),
        folder="dé pöt/project",
        umask=0,
        reverse=True,
    ),
}
KERNELS = {
    "2 threads": Setting({"OMP_NUM_THREADS": "2"}, threads=2),
    "torch without AVX": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "torch with AVX2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "oneDNN with SSE 4.1": Setting({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "oneDNN with AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "MKL for any CPU": Setting({"MKL_CBWR": "COMPATIBLE"}),
    "OpenBLAS for Haswell": Setting({"OPENBLAS_CORETYPE": "Haswell"}),
    "an old CPU": Setting(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
            "OPENBLAS_CORETYPE": "Nehalem",
        }
    ),
}


def sown(project: Path, place: Path, setting: Setting) -> Path:
    """What a project is made of, without what it made, in a folder of the setting."""
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
    """A Python module in the project, as the setting says.

    Raises:
        CalledProcessError: it failed.
    """
    usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{REPOSITORY}", "DVC_NO_ANALYTICS": "1"}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    allowed = sorted(os.sched_getaffinity(0))[: setting.n_cpus]
    limited = ["taskset", "-c", ",".join(map(str, allowed))] if setting.n_cpus and shutil.which("taskset") else []
    subprocess.run(
        [*limited, sys.executable, "-m", *command],
        cwd=root,
        env=os.environ | usual | path | setting.environment,
        umask=setting.umask,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
    )


def built(project: Path, place: Path, setting: Setting) -> Path:
    """The whole pipeline in the setting, by DVC, without a cache."""
    root = sown(project, place, setting)
    # With git, since DVC then has a .gitignore beside its outputs, which counts in a folder that is a dependency.
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    run(root, setting, "dvc", "init", "-q")
    run(root, setting, "dvc", "repro")
    return root


def staged(project: Path, place: Path, setting: Setting) -> Path:
    """The stages of some variants in the setting, one after the other in one process."""
    root = sown(project, place, setting)
    run(root, setting, "tests.faults.determinism", "--here")
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


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file that the pipeline wrote, by name."""
    folders = [root / "data", root / "results"]
    files = [root / "dvc.lock", *(file for folder in folders for file in folder.rglob("*"))]
    return {f.relative_to(root).as_posix(): file_sha256(f) for f in sorted(files) if f.is_file()}


def differing(project: Path, root: Path) -> list[str]:
    """Files of ``root`` that are not the same bytes in ``project``, and such as are there alone."""
    before, after = contents(project), contents(root)
    return sorted(name for name, digest in after.items() if before.get(name) != digest)


@dataclass(frozen=True)
class Moved:
    """How far a project is from another one of the same parameters.

    Attributes:
        covariance: largest relative distance, in the Frobenius norm, of a covariance.
        singular_values: largest distance of a singular value, over the largest of its matrix.
        ranks: units of which form or rank differ.
        n_units: units in all.
        objective: largest relative distance of the loss that an allocation expects.
        perplexity: largest relative distance of a token perplexity.
    """

    covariance: float
    singular_values: float
    ranks: int
    n_units: int
    objective: float
    perplexity: float


def moved(project: Path, root: Path) -> Moved:
    """How far the variants of ``VARIANTS`` are apart in two projects."""
    covariances = [file.relative_to(root) for file in (root / "data/covariance/0").rglob("*.safetensors")]
    pairs = [(read_tensors(project / f)["covariance"], read_tensors(root / f)["covariance"]) for f in covariances]
    spectra = [
        tuple(read_tensors(r / f"data/spectrum/{key}/singular_values.safetensors") for r in (project, root))
        for key in VARIANTS.values()
    ]
    values = [(before[name], after[name]) for before, after in spectra for name in before]
    allocations = [tuple(read_json(r / f"data/allocation/{v}.json") for r in (project, root)) for v in VARIANTS]
    units = [pair for a, b in allocations for pair in zip(a["units"], b["units"], strict=True)]
    figures = [tuple(read_json(r / f"results/{v}.json") for r in (project, root)) for v in VARIANTS]
    names = [name for name in figures[0][0] if name.startswith("token_perplexity/") and "stderr" not in name]
    return Moved(
        covariance=max(float((a - b).norm() / a.norm()) for a, b in pairs),
        singular_values=max(float((a - b).abs().max() / a.max()) for a, b in values),
        ranks=sum((a["form"], a["rank"]) != (b["form"], b["rank"]) for a, b in units),
        n_units=len(units),
        objective=max(_apart(a["objective"]["value"], b["objective"]["value"]) for a, b in allocations),
        perplexity=max(_apart(a[name], b[name]) for a, b in figures for name in names),
    )


def _apart(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else abs(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, help="a reproduced project to compare with; made where left out")
    parser.add_argument("--only", choices=("bytes", "kernels"), help="one of the two tables")
    parser.add_argument("--here", action="store_true", help="run the stages in the current folder, and no more")
    asked = parser.parse_args()
    if asked.here:
        run_stages()
        return
    typer.echo(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as scratch:
        project = asked.project or Path(scratch) / "project"
        if asked.project is None:
            reproduce(project)
        for name, setting in BYTES.items() if asked.only != "kernels" else ():
            root = built(project, Path(tempfile.mkdtemp(dir=scratch)), setting)
            off = differing(project, root)
            typer.echo(f"{name:22} {len(contents(root)):4} files, {len(off)} differ: {', '.join(off) or 'none'}")
        for name, setting in KERNELS.items() if asked.only != "bytes" else ():
            root = staged(project, Path(tempfile.mkdtemp(dir=scratch)), setting)
            typer.echo(f"{name:22} {len(differing(project, root))} files differ; {moved(project, root)}")


if __name__ == "__main__":
    main()
