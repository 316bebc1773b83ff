"""How much memory, disk and time does a model of 7, 13 or 70 billion parameters take?

``python -m benchmarks.footprint [--bf16 GFLOP/S --float64 GFLOP/S]``. Arithmetic, no model: what the stages hold and
write, as tests/test_footprint.py compares with small ones that run. Time is FLOPs over the speed of matrix products,
measured here where none is given: a bound from below, which passes come near (45 % was measured) and eigenproblems do
not (21 %; docs/performance.md). GB are 10⁹ bytes.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu import EIGH, OWNERS, Shape, spectrum_flops
from benchmarks.gpu import rank as rank_of
from benchmarks.measure import print_table, product, seconds
from drank.covariance import PANEL

MODELS = (
    Shape("7B", 32, 4096, 11008, 32, 32, 32000),
    Shape("13B", 40, 5120, 13824, 40, 40, 32000),
    Shape("70B", 80, 8192, 28672, 64, 8, 32000),
)
SIZE = 0.8
REMOVED_AT_ONCE = 48  # drank.channels.remove_channels


@dataclass(frozen=True)
class Setting:
    """Calibration as in params.yaml; the literature's windows."""

    n_windows: int = 256
    window_length: int = 2048
    batch_windows: int = 4
    cuts: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)

    @property
    def tokens(self) -> int:
        return self.n_windows * self.window_length

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return self.batch_windows * self.window_length


# Parameters


def block_parameters(shape: Shape) -> int:
    """Linears and two norms."""
    return shape.n_parameters + 2 * shape.hidden


def end_parameters(shape: Shape) -> int:
    """Embeddings, last norm, and a head of its own."""
    return 2 * shape.vocabulary * shape.hidden + shape.hidden


def model_parameters(shape: Shape) -> int:
    return shape.n_layers * block_parameters(shape) + end_parameters(shape)


# Memory of the covariance stage, bytes


def input_sides(shape: Shape) -> list[int]:
    """Widths of a block's inputs, one that several linears share once."""
    return [n for name, (_, n) in shape.linears.items() if OWNERS[name] == name]


def output_sides(shape: Shape) -> list[int]:
    """Widths of a block's output gradients."""
    return [out for out, _ in shape.linears.values()]


def moments(sides: Sequence[int]) -> int:
    """Running sums: d² float32 of products and d float64 of magnitudes each."""
    return sum(4 * d**2 + 8 * d for d in sides)


def writing(sides: Sequence[int]) -> int:
    """What makes a mean of the widest sum: one float32 matrix beside it."""
    return 4 * max(sides) ** 2


def forward_peak(shape: Shape, tokens: int) -> int:
    """Of a block's forward pass, largest where the input of down is watched: (4 d + 10 m) bytes a token with d the
    hidden and m the MLP's size. The residual stream is there twice; that input is there in bfloat16, in float32 and as
    absolute values."""
    return tokens * (4 * shape.hidden + 10 * shape.mlp)


def graph(shape: Shape, tokens: int) -> int:
    """What a block keeps for its backward pass: 12 d + 4 d_kv + 6 m + 4 heads + 8 bytes a token. Inputs of two norms in
    float32 and their scales; queries, keys, values, attention's output and its log-sums; three of the MLP's
    activations. Weights need no gradient, so inputs of linears are not kept."""
    kv = shape.kv_heads * shape.head_size
    return tokens * (12 * shape.hidden + 4 * kv + 6 * shape.mlp + 4 * shape.heads + 8)


def backward_peak(shape: Shape, tokens: int) -> int:
    """Of a block's backward pass, its graph included: largest where up's gradient is watched, after two of the MLP's
    activations were freed: 8 m + 6 d bytes a token more than the graph."""
    return graph(shape, tokens) + tokens * (8 * shape.mlp + 6 * shape.hidden)


def head_peak(shape: Shape, tokens: int) -> int:
    """Logits and their gradient in float32, in bfloat16, and cut by a token a window: 14 bytes a token and word."""
    return 14 * tokens * shape.vocabulary


def memory(shape: Shape, setting: Setting, kfac: bool, offload: bool) -> dict[str, int]:
    """Bytes of the covariance stage, by what they are; the process itself, some 0.5 GB, not counted.

    Sums of inputs and of gradients are held together, unless offloaded: inputs are then watched forwards and gradients
    backwards, block by block.
    """
    inputs, gradients = input_sides(shape), output_sides(shape) if kfac else []
    n_blocks = 1 if offload else shape.n_layers
    forward, backward = forward_peak(shape, setting.batch), backward_peak(shape, setting.batch)
    if not kfac:
        passes = forward
    elif offload:
        passes = max(forward, backward, head_peak(shape, setting.batch))
    else:
        others = (shape.n_layers - 1) * graph(shape, setting.batch)
        head = graph(shape, setting.batch) + head_peak(shape, setting.batch)
        passes = others + max(forward, backward, head)
    sums = [moments(inputs), moments(gradients)]
    return {
        "weights": 2 * (n_blocks * block_parameters(shape) + end_parameters(shape)),
        "covariances": n_blocks * (max(sums) if offload else sum(sums)),
        "pass or writing": max(passes, writing(inputs + gradients)),
    }


# Bytes that a unit of spectrum, or an MLP with its cuts, takes in float64, over the square of the MLP's size. Counted
# on small models of such proportions (hidden size .29 to .37 of the MLP's), and rounded up from 30 to 34 and 74 to 80.
UNIT, MLP = 34, 80


def spectrum_memory(shape: Shape, blocks: bool) -> dict[str, int]:
    """Bytes of the spectrum stage, which loads the whole model."""
    return {"weights": 2 * model_parameters(shape), "unit": (MLP if blocks else UNIT) * shape.mlp**2}


# Disk, bytes


def covariance_files(shape: Shape, kfac: bool) -> int:
    """float32: H and the magnitudes of every input, and G of every linear's output gradient."""
    inputs = sum(4 * (d**2 + d) for d in input_sides(shape))
    return shape.n_layers * (inputs + sum(4 * d**2 for d in output_sides(shape)) * kfac)


def hidden_states(shape: Shape, setting: Setting, kfac: bool) -> int:
    """bfloat16, of an offloaded run, gone afterwards: what the blocks put out; for kfac of all of them at once, whose
    place gradients take. One batch is there twice."""
    blocks = shape.n_layers if kfac else 1
    return (blocks * setting.tokens + setting.batch) * shape.hidden * 2


def factors(out: int, n: int) -> int:
    """float32 vectors of both sides at full rank."""
    return 4 * (out + n) * min(out, n)


def cut_sizes(shape: Shape, setting: Setting) -> list[int]:
    return [round(shape.mlp * (1 - share)) for share in setting.cuts]


def spectrum_units(shape: Shape, setting: Setting, blocks: bool) -> Iterator[tuple[int, int]]:
    """(out, in) of all factored matrices of a layer. As blocks: those of the MLP once for every cut."""
    for name, (out, n) in shape.linears.items():
        if not blocks or name in ("q", "k", "v", "o"):
            yield out, n
        else:
            yield from ((out, m) if name == "down" else (m, n) for m in cut_sizes(shape, setting))


def spectrum_files(shape: Shape, setting: Setting, blocks: bool) -> int:
    """Factors, singular values (float64), and for every cut the corrected down (float32) and the channels (int64)."""
    units = list(spectrum_units(shape, setting, blocks))
    total = sum(factors(*unit) + 8 * min(unit) for unit in units)
    if blocks:
        total += sum(4 * shape.hidden * m + 8 * m for m in cut_sizes(shape, setting))
    return shape.n_layers * total


def compressed_folder(shape: Shape, size: float, pivot: bool) -> int:
    """bfloat16; pivot form has 4 bytes an output on top."""
    linears = size * 2 * shape.n_parameters + (4 * sum(output_sides(shape)) if pivot else 0)
    return round(shape.n_layers * (linears + 4 * shape.hidden) + 2 * end_parameters(shape))


# Time, FLOPs


def moment_flops(d: int) -> int:
    """A token; panels of rows from the diagonal on."""
    return sum(2 * min(PANEL, d - i) * (d - i) for i in range(0, d, PANEL))


def covariance_flops(shape: Shape, setting: Setting, kfac: bool, offload: bool) -> float:
    """Passes and sums. Causal attention takes 2 · hidden · length a token, 2.5 times as much backward; the linears,
    whose weights need no gradient, as much backward as forward. Offloaded, a backward pass runs its block again."""
    linears, attention = 2 * shape.n_parameters, 2 * shape.hidden * setting.window_length
    layer: float = linears + attention + sum(map(moment_flops, input_sides(shape)))
    if not kfac:
        return setting.tokens * shape.n_layers * layer
    layer += linears + 2.5 * attention + sum(map(moment_flops, output_sides(shape)))
    layer += (linears + attention) * offload
    return setting.tokens * (shape.n_layers * layer + 4 * shape.vocabulary * shape.hidden)


def channel_flops(shape: Shape, setting: Setting) -> float:
    """Of removing channels from a layer's MLP: the inverse of H (2 m³), the root of G, and downdates of H⁻¹ and of
    [W; G^½ W], where removing the channels from m to m' takes 2/3 (m³ - m'³) and 2 · hidden · (m² - m'²)."""
    m, least, d = shape.mlp, min(cut_sizes(shape, setting)), shape.hidden
    root = (EIGH + 2) * d**3 + 2 * d * d * m
    return 2 * m**3 + root + 2 / 3 * (m**3 - least**3) + 2 * d * (m**2 - least**2)


def spectra_flops(shape: Shape, setting: Setting, kfac: bool, blocks: bool) -> float:
    layer = sum(spectrum_flops(out, n, kfac) for out, n in spectrum_units(shape, setting, blocks))
    return shape.n_layers * (layer + channel_flops(shape, setting) * blocks)


def pivot_flops(shape: Shape, size: float) -> float:
    """LU of (out, r), coefficients by a triangular solve, and the kept rows."""
    total = 0.0
    for out, n in shape.linears.values():
        r = rank_of("pivot", out, n, size, 1)
        total += (out * r**2 - r**3 / 3) + (out - r) * r**2 + 2 * r**2 * n
    return shape.n_layers * total


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
