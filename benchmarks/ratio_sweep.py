"""Cost of another size ratio. Allocation and compression, against what D-Rank's released code does again.

``python -m benchmarks.ratio_sweep``, in a project where ``dvc repro`` ran. Both stages run in this process, beside the
project's dvc.lock, on its model and cached factors, and write to a temporary folder: what DVC starts but for the start
of Python. Yardstick: benchmarks/yardstick.py on the project's
covariances, its linear algebra alone (ours includes reading, writing and hashing), on some layers, scaled to all.
The limit: writing the bytes, and reading those of the factors.
"""

import argparse
import contextlib
import cProfile
import pstats
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from stages import allocation, compression
from transformers import AutoModelForCausalLM

from benchmarks import yardstick
from benchmarks.measure import arguments, begin, interleaved, print_table, shown
from drank.model.linears import Linear, find_linears
from drank.project.files import read_json, read_tensors
from drank.project.params import read_params

# Where time goes: what is shown, and the function that cProfile knows it by.
PARTS = {
    "HiGHS": "_milp.py:milp",
    "read model": "modeling_utils.py:from_pretrained",
    "read factors": "files.py:read_rows",
    "sha256": "files.py:file_sha256",
    "hash inputs": "dvc.py:__truediv__",
    "factors": "spectrum.py:factors",
    "pivot form": "pivot.py:pivot_rows",
    "of it, pivoted QR": "_decomp_qr.py:qr",
    "of it, solve": "~:linalg_solve",
    "of it, finite?": "covariance.py:finite",
    "save": "modeling_utils.py:save_pretrained",
}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--presets", nargs="+", default=["svd-llm", "d-rank", "kfac-aligned"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.5])
    parser.add_argument(
        "--layers", nargs="+", type=int, default=[5, 15, 25], help="layers that the yardstick is run on"
    )
    asked = parser.parse_args()
    begin(asked)
    with project(asked.presets, asked.ratios) as root:
        sweep(root, asked)


@contextlib.contextmanager
def project(presets: list[str], ratios: list[float]) -> Iterator[Path]:
    """A temporary project on this one's model, covariances and factors, with a variant for each preset and ratio."""
    here = Path().resolve()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        params = yaml.safe_load((here / "params.yaml").read_text())
        params["variants"] = {
            named(preset, ratio): {
                "preset": preset, "spectrum": params["presets"][preset]["spectrum"], "size_ratio": ratio
            }
            for preset in presets
            for ratio in ratios
        }  # fmt: skip
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        shutil.copy(here / "dvc.lock", root)  # so that stages compare what they read with it, as they do under DVC
        (root / ".dvc").symlink_to(here / ".dvc")
        (root / "data").mkdir()
        for folder in ("raw", "covariance", "spectrum"):
            (root / "data" / folder).symlink_to(here / "data" / folder)
        yield root


def named(preset: str, ratio: float) -> str:
    return f"{preset}-{100 * ratio:.0f}"


def sweep(root: Path, asked: argparse.Namespace) -> None:
    names = [named(preset, ratio) for ratio in asked.ratios for preset in asked.presets]
    runs = {
        f"{step.__name__} {name}": partial(step.main, name, root)
        for name in names
        for step in (allocation, compression)
    }
    every_layer, layers = yardstick_layers(root, asked.layers)
    runs |= {f"yardstick {part}": run for part, run in yardstick_parts(layers).items()}
    runs["write"] = partial(write_again, root, names[0])
    for step in (allocation, compression):  # once, for what is imported late
        step.main(names[0], root)
    times = interleaved(runs, asked.rounds, warm_up=False)
    scale = every_layer / len(asked.layers)

    def of_rounds(*keys: str) -> list[float]:
        return [sum(round_) for round_ in zip(*(times[key] for key in keys), strict=True)]

    once = [scale * s for s in of_rounds("yardstick whiten", "yardstick svdvals", "yardstick svd")]
    twice = [scale * s for s in of_rounds("yardstick whiten", "yardstick whiten", "yardstick svdvals", "yardstick svd")]
    rows = []
    for name in names:
        ours = of_rounds(f"stages.allocation {name}", f"stages.compression {name}")
        times_faster = [b / a for a, b in zip(ours, once, strict=True)]
        parts = [shown(times[f"{step} {name}"]) for step in ("stages.allocation", "stages.compression")]
        rows.append([name, *parts, shown(ours), shown(times_faster, digits=1)])
    print_table(["variant", "allocation", "compression", "both", "times faster than the yardstick"], rows)
    parts = {part: [scale * s for s in times[f"yardstick {part}"]] for part in ("whiten", "svdvals", "svd")}
    print(f"Yardstick, layers {asked.layers}, times {scale:g}:\n")
    print_table(
        ["Cholesky and inverse", "singular values", "SVD and basis", "once each", "as released, whitened twice"],
        [[shown(parts["whiten"]), shown(parts["svdvals"]), shown(parts["svd"]), shown(once), shown(twice)]],
    )
    print(f"Limit: writing the weights of {names[0]} again, {shown(times['write'])}\n")
    profile(root, [named(preset, asked.ratios[-1]) for preset in asked.presets])


def yardstick_layers(root: Path, layers: list[int]) -> tuple[int, list[tuple[Linear, torch.Tensor]]]:
    """Number of layers of the model; the linears of some, each with XᵀX."""
    params = read_params(root / "params.yaml").covariance
    model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=torch.float32)
    linears = find_linears(model, params.targets, params.ignore)
    folder = root / "data/covariance/0"
    owners = read_json(folder / "summary.json")["owners"]

    @cache
    def xtx(owner: str) -> torch.Tensor:
        return read_tensors(folder / f"inputs/{owner}.safetensors")["covariance"]

    return len({x.layer for x in linears}), [(x, xtx(owners[x.name])) for x in linears if x.layer in layers]


def yardstick_parts(layers: list[tuple[Linear, torch.Tensor]]) -> dict[str, Any]:
    whitened = [yardstick.whitened(xtx) for _, xtx in layers]
    weights = [linear.weight.detach() for linear, _ in layers]
    return {
        "whiten": lambda: [yardstick.whitened(xtx) for _, xtx in layers],
        "svdvals": lambda: [yardstick.singular_values(W, S) for W, (S, _) in zip(weights, whitened, strict=True)],
        "svd": lambda: [yardstick.factors(W, *s) for W, s in zip(weights, whitened, strict=True)],
    }


def write_again(root: Path, name: str) -> None:
    source = root / "data/compression" / name / "model.safetensors"
    save_file(load_file(source), source.with_name("again.safetensors"))
    source.with_name("again.safetensors").unlink()


def profile(root: Path, names: list[str]) -> None:
    """Where the time goes; the profiler itself costs some."""
    rows = []
    for name in names:
        profiler = cProfile.Profile()
        shutil.rmtree(root / "data/compression" / name, ignore_errors=True)
        profiler.enable()
        allocation.main(name, root)
        compression.main(name, root)
        profiler.disable()
        rows.append([name, *parts_of(pstats.Stats(profiler))])
    print("Under the profiler, seconds:\n")
    print_table(["variant", "all", *PARTS], rows)


def parts_of(stats: pstats.Stats) -> list[str]:
    known: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = stats.stats  # type: ignore[attr-defined]

    def cumulative(part: str) -> float:
        file, _, function = part.partition(":")
        return max((v[3] for k, v in known.items() if Path(k[0]).name == file and function in k[2]), default=0.0)

    total = sum(v[2] for v in known.values())
    return [f"{total:.2f}"] + [f"{cumulative(part):.2f}" for part in PARTS.values()]


if __name__ == "__main__":
    main()
