"""How much memory, disk and time does a model of 7, 13 or 70 billion parameters take?

``python -m benchmarks.footprint [--bf16 GFLOP/S --float64 GFLOP/S]``. Arithmetic, no model: the formulas of
drank.planning.footprint, which tests/test_footprint.py compares with small models that run. Time is FLOPs over
the speed of matrix products, measured here where none is given: a bound from below, which passes come near (45 % was
measured) and eigenproblems do not (21 %; docs/performance.md). GB are 10⁹ bytes.
"""

import argparse
from collections.abc import Iterator

import torch

from benchmarks.measure import print_table, product, seconds
from drank.planning.footprint import (
    Setting,
    Shape,
    compressed_folder,
    covariance_files,
    covariance_flops,
    hidden_states,
    memory,
    model_parameters,
    pivot_flops,
    spectra_flops,
    spectrum_files,
    spectrum_memory,
)

MODELS = (
    Shape("7B", 32, 4096, 11008, 32, 32, 32000),
    Shape("13B", 40, 5120, 13824, 40, 40, 32000),
    Shape("70B", 80, 8192, 28672, 64, 8, 32000),
)
SIZE = 0.8

# Tables

METRICS = (("input", False, False), ("kfac", True, False), ("kfac, blocks", True, True))


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g}" if n_bytes < 1e12 else f"{n_bytes / 1e9:.0f}"


def memory_rows(setting: Setting) -> Iterator[list[str]]:
    for shape in MODELS:
        for metric, kfac, _ in METRICS[:2]:
            for offload in (False, True):
                parts = memory(shape, setting, kfac, offload)
                row = [shape.name, metric, "yes" if offload else "no"]
                yield [*row, *map(gb, parts.values()), gb(sum(parts.values()))]


def spectrum_memory_rows() -> Iterator[list[str]]:
    for shape in MODELS:
        parts = [spectrum_memory(shape, blocks) for blocks in (False, True)]
        yield [
            shape.name,
            gb(parts[0]["weights"]),
            *(gb(p["unit"]) for p in parts),
            *(gb(sum(p.values())) for p in parts),
        ]


def disk_rows(setting: Setting) -> Iterator[list[str]]:
    for shape in MODELS:
        for metric, kfac, blocks in METRICS:
            sizes = [
                2 * model_parameters(shape),
                covariance_files(shape, kfac),
                hidden_states(shape, setting, kfac),
                spectrum_files(shape, setting, blocks),
                compressed_folder(shape, SIZE, pivot=kfac),
            ]
            yield [shape.name, metric, *map(gb, sizes)]


def time_rows(setting: Setting, bf16: float, float64: float) -> Iterator[list[str]]:
    """Speeds in FLOP/s; hours."""
    for shape in MODELS:
        for metric, kfac, blocks in METRICS:
            hours = [
                covariance_flops(shape, setting, kfac, offload=False) / bf16 / 3600,
                covariance_flops(shape, setting, kfac, offload=True) / bf16 / 3600,
                spectra_flops(shape, setting, kfac, blocks) / float64 / 3600,
                pivot_flops(shape, SIZE) / float64 / 3600 if kfac else 0.0,
            ]
            yield [shape.name, metric, *(f"{h:.3g}" if h else "-" for h in hours)]


def speed(dtype: torch.dtype, size: int = 1536, rounds: int = 5) -> float:
    """FLOP/s of a matrix product, the best of a few."""
    run = product(dtype, size)
    return 2 * size**3 / min(seconds(run) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for dtype in ("bf16", "float64"):
        parser.add_argument(
            f"--{dtype}", type=float, metavar="GFLOP/S", help="speed of products; measured if not given"
        )
    parser.add_argument("--batch-windows", type=int, default=Setting.batch_windows)
    asked = parser.parse_args()
    setting = Setting(batch_windows=asked.batch_windows)
    bf16 = asked.bf16 * 1e9 if asked.bf16 else speed(torch.bfloat16)
    float64 = asked.float64 * 1e9 if asked.float64 else speed(torch.float64)
    print(f"{setting.n_windows} windows of {setting.window_length} tokens, {setting.batch_windows} a batch\n")
    print("Memory of the covariance stage, GB:\n")
    columns = ["weights", "covariances", "a batch's pass, or writing", "all"]
    print_table(["model", "metric", "offload", *columns], list(memory_rows(setting)))
    print("Memory of the spectrum stage, GB:\n")
    columns = ["weights", "largest unit", "MLP with cuts", "all", "all, blocks"]
    print_table(["model", *columns], list(spectrum_memory_rows()))
    print("Disk, GB:\n")
    columns = ["model", "covariance", "hidden states (offload, temporary)", "spectrum", f"compressed at {SIZE}"]
    print_table(["", "metric", *columns], list(disk_rows(setting)))
    origin = "given" if asked.bf16 and asked.float64 else f"measured here, {torch.get_num_threads()} threads"
    print(f"Hours at {bf16 / 1e9:.0f} GFLOP/s in bfloat16 and {float64 / 1e9:.0f} in float64 ({origin}):\n")
    columns = ["covariance", "covariance, offload", "spectrum", f"pivot rows at {SIZE}"]
    print_table(["model", "metric", *columns], list(time_rows(setting, bf16, float64)))


if __name__ == "__main__":
    main()
