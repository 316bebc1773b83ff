"""Memory, disk and arithmetic of every step, from the shape of a decoder alone: what the stages hold and write.

Numbers only. The formulas are those of a Llama, which tests/test_footprint.py compares with small ones that run. For a
decoder with another block (OPT), parameters, files and the FLOPs of linears are exact too; peaks of passes are about
right. Bytes and FLOPs; GB are 10⁹ bytes where somebody prints them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EIGH = 10 / 3  # n³ operations of a symmetric eigenproblem: reduction to tridiagonal form, and vectors back
SMALL = 2048  # width up to which matrices are factored side by side, as in drank.method.threads
PANEL = 128  # rows of a covariance in one product, as in drank.method.covariance, which imports torch
READS_AS = {"k": "q", "v": "q", "up": "gate"}  # who reads the input of whom


@dataclass(frozen=True)
class Shape:
    """A decoder with rotary or learned positions, and an MLP of two matrices or, ``gated``, of three."""

    name: str
    n_layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linears. The first matrix of an MLP of two goes by the name of gate."""
        d, kv, m = self.hidden, self.kv_heads * self.head_size, self.mlp
        mlp = {"gate": (m, d), "up": (m, d), "down": (d, m)} if self.gated else {"gate": (m, d), "down": (d, m)}
        return {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), **mlp}

    @property
    def n_parameters(self) -> int:
        """Weights of a block's linears."""
        return sum(out * n for out, n in self.linears.values())


@dataclass(frozen=True)
class Setting:
    """Calibration as in params.yaml; the literature's windows. ``back_windows`` are sent back, all without it."""

    n_windows: int = 256
    window_length: int = 2048
    batch_windows: int = 4
    cuts: tuple[float, ...] = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)
    back_windows: int | None = None

    @property
    def tokens(self) -> int:
        return self.n_windows * self.window_length

    @property
    def back(self) -> int:
        """Tokens that are sent back."""
        return (self.back_windows or self.n_windows) * self.window_length

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return self.batch_windows * self.window_length


# Parameters


def block_parameters(shape: Shape) -> int:
    """Linears and two norms."""
    return shape.n_parameters + 2 * shape.hidden


def end_parameters(shape: Shape) -> int:
    """Embeddings, last norm, and a head unless it is tied."""
    return ((1 if shape.tied else 2) * shape.vocabulary + 1) * shape.hidden


def model_parameters(shape: Shape) -> int:
    return shape.n_layers * block_parameters(shape) + end_parameters(shape)


# Memory of the covariance stage, bytes


def input_sides(shape: Shape) -> list[int]:
    """Widths of a block's inputs, one that several linears share once."""
    return [n for name, (_, n) in shape.linears.items() if name not in READS_AS]


def output_sides(shape: Shape) -> list[int]:
    """Widths of a block's output gradients."""
    return [out for out, _ in shape.linears.values()]


def moments(sides: Sequence[int], magnitudes: bool) -> int:
    """Running sums: d² float32 of products each and, of inputs, d float64 of magnitudes."""
    return sum(4 * d**2 + 8 * d * magnitudes for d in sides)


def passes(shape: Shape, tokens: int) -> dict[str, int]:
    """Bytes that passes over so many tokens hold at once; d is the hidden size, m the MLP's, d_kv that of all keys.

    * forward: a block's pass, largest where the input of down is watched: 4 d + 6 m per token. The residual stream is
      there twice, that input in bfloat16 and in float32.
    * graph: what a block's backward pass needs: 12 d + 4 d_kv + 6 m + 4 heads + 8 per token. Inputs of two norms in
      float32 and their scales; queries, keys, values, attention's output and its log-sums; three of the MLP's
      activations. Weights need no gradient, so inputs of linears are not kept.
    * backward: a block's backward pass with its graph, largest where up's gradient is watched, after two of the MLP's
      activations were freed: 6 m + 6 d per token more than the graph.
    * head: logits and their gradient in float32, in bfloat16, and cut by a token per window: 14 per token and word.
    """
    d, m, d_kv = shape.hidden, shape.mlp, shape.kv_heads * shape.head_size
    graph = 12 * d + 4 * d_kv + 6 * m + 4 * shape.heads + 8
    sizes = {"forward": 4 * d + 6 * m, "graph": graph, "backward": graph + 6 * (m + d), "head": 14 * shape.vocabulary}
    return {name: tokens * size for name, size in sizes.items()}


def memory(shape: Shape, setting: Setting, kfac: bool, offload: bool) -> dict[str, int]:
    """Bytes of the covariance stage, by what they are; the process itself, some 0.5 GB, not counted.

    Sums of inputs and of gradients are held together, unless offloaded: inputs are then watched forwards and gradients
    backwards, block by block. Making a mean takes one float32 matrix beside the widest sum.
    """
    inputs, gradients = input_sides(shape), output_sides(shape) if kfac else []
    n_blocks = 1 if offload else shape.n_layers
    forward, graph, backward, head = passes(shape, setting.batch).values()
    if not kfac:
        peak = forward
    elif offload:
        peak = max(forward, backward, head)
    else:
        peak = (shape.n_layers - 1) * graph + max(forward, backward, graph + head)
    sums = [moments(inputs, magnitudes=True), moments(gradients, magnitudes=False)]
    return {
        "weights": 2 * (n_blocks * block_parameters(shape) + end_parameters(shape)),
        "covariances": n_blocks * (max(sums) if offload else sum(sums)),
        "pass or writing": max(peak, 4 * max(inputs + gradients) ** 2),
    }


# Bytes that a unit of spectrum, or an MLP with its cuts, takes in float64, over the square of the MLP's size. On small
# models of such proportions (hidden size .29 to .37 of the MLP's) 20 to 21 were counted, and 58 to 74.
UNIT, MLP = 21, 66


def spectrum_memory(shape: Shape, blocks: bool, threads: int = 1) -> dict[str, int]:
    """Bytes of the spectrum stage, which loads the whole model, and factors small units side by side."""
    at_once = threads if max(shape.mlp, shape.hidden) <= SMALL else 1
    return {"weights": 2 * model_parameters(shape), "unit": at_once * (MLP if blocks else UNIT) * shape.mlp**2}


# Disk, bytes


def covariance_files(shape: Shape, kfac: bool) -> int:
    """float32: H and the magnitudes of every input, and G of every linear's output gradient."""
    inputs = sum(4 * (d**2 + d) for d in input_sides(shape))
    return shape.n_layers * (inputs + sum(4 * d**2 for d in output_sides(shape)) * kfac)


def hidden_states(shape: Shape, setting: Setting, kfac: bool) -> int:
    """bfloat16 outputs of the blocks of an offloaded run, gone afterwards; for kfac of all blocks at once, whose place
    gradients take. One batch is there twice."""
    blocks = shape.n_layers if kfac else 1
    return (blocks * setting.tokens + setting.batch) * shape.hidden * 2


def vectors(out: int, n: int, kfac: bool) -> int:
    """float32 vectors of the smaller side at full rank, and as many duals where that side has a metric."""
    return 4 * min(out, n) ** 2 * (2 if kfac or out > n else 1)


def cut_sizes(shape: Shape, setting: Setting) -> list[int]:
    return [round(shape.mlp * (1 - share)) for share in setting.cuts]


def spectra_units(shape: Shape, setting: Setting, blocks: bool, layers: int = 1) -> Iterator[tuple[int, int]]:
    """(out, in) of all factored matrices of the model: as blocks, an MLP's once for every cut; where ``layers``
    consecutive layers share a basis, stacked, but for o and down."""
    whole, rest = divmod(shape.n_layers, layers)
    for name, (out, n) in shape.linears.items():
        if blocks and name not in ("q", "k", "v", "o"):
            for m in cut_sizes(shape, setting):
                yield from [(out, m) if name == "down" else (m, n)] * shape.n_layers
        elif layers == 1 or name in ("o", "down"):
            yield from [(out, n)] * shape.n_layers
        else:
            yield from [(layers * out, n)] * whole + [(rest * out, n)] * (rest > 0)


def spectrum_files(shape: Shape, setting: Setting, blocks: bool, layers: int = 1) -> int:
    """Vectors, singular values (float64), and for every cut the corrected down (float32) and the channels (int64).

    As blocks in the metric of inputs and gradients, else in that of inputs.
    """
    total = sum(vectors(*unit, blocks) + 8 * min(unit) for unit in spectra_units(shape, setting, blocks, layers))
    cut = [m for m in cut_sizes(shape, setting) if m < shape.mlp] if blocks else []
    return total + shape.n_layers * sum(4 * shape.hidden * m + 8 * m for m in cut)


def compressed_parameters(shape: Shape, size: float) -> int:
    """The whole model, with the share ``size`` of its linears' weights."""
    return round(model_parameters(shape) - (1 - size) * shape.n_layers * shape.n_parameters)


def compressed_folder(shape: Shape, size: float, pivot: bool) -> int:
    """bfloat16; pivot form has 4 bytes per output on top."""
    return 2 * compressed_parameters(shape, size) + 4 * shape.n_layers * sum(output_sides(shape)) * pivot


# Time, FLOPs


def moment_flops(d: int) -> int:
    """FLOPs per token: panels of rows from the diagonal on."""
    return sum(2 * min(PANEL, d - i) * (d - i) for i in range(0, d, PANEL))


def covariance_flops(shape: Shape, setting: Setting, kfac: bool, offload: bool) -> float:
    """Passes and sums. Causal attention takes 2 · hidden · length per token, 2.5 times as much backward; the linears,
    whose weights need no gradient, as much backward as forward. Offloaded, a backward pass runs its block again."""
    linears, attention = 2 * shape.n_parameters, 2 * shape.hidden * setting.window_length
    forward = float(linears + attention + sum(map(moment_flops, input_sides(shape))))
    backward = linears + 2.5 * attention + sum(map(moment_flops, output_sides(shape)))
    backward += (linears + attention) * offload
    back = shape.n_layers * backward + 4 * shape.vocabulary * shape.hidden
    return setting.tokens * shape.n_layers * forward + setting.back * back * kfac


def channel_flops(shape: Shape, setting: Setting) -> float:
    """FLOPs of removing channels from a layer's MLP: the inverse of H (2 m³), the root of G, and downdates of all of
    H⁻¹ and of [W; G^½ W], which take 2 m² and 4 · hidden · m for every channel removed."""
    m, least, d = shape.mlp, min(cut_sizes(shape, setting)), shape.hidden
    root = (EIGH + 2) * d**3 + 2 * d * d * m
    return float(2 * m**3 + root + (m - least) * (2 * m**2 + 4 * d * m))


def spectrum_flops(out: int, n: int, kfac: bool) -> float:
    """FLOPs of ``drank.method.spectrum.whitened_spectrum`` of a matrix (out, in), at most: each metric has a root by
    an eigenproblem, where a covariance that is not singular has a Cholesky factor at a twentieth of the cost."""
    d, e = min(out, n), max(out, n)
    near, far = kfac or out > n, kfac or out <= n
    return 2 * d * d * e + 2 * d * e * e * far + (2 * EIGH + 8 if near else EIGH) * d**3 + 2 * e * d * d + 2 * d**3


def spectra_flops(shape: Shape, setting: Setting, kfac: bool, blocks: bool, layers: int = 1) -> float:
    matrices = sum(spectrum_flops(*unit, kfac) for unit in spectra_units(shape, setting, blocks, layers))
    return matrices + (shape.n_layers * channel_flops(shape, setting) if blocks else 0.0)


def pivot_rank(out: int, n: int, size: float) -> int:
    """Rank r at which r (out + in - r) parameters are the share ``size`` of out · in, rounded down."""
    return max(1, int((out + n - ((out + n) ** 2 - 4 * size * out * n) ** 0.5) / 2))


def pivot_flops(shape: Shape, size: float) -> float:
    """LU of (out, r), coefficients by a triangular solve, and the kept rows."""
    total = 0.0
    for out, n in shape.linears.values():
        r = pivot_rank(out, n, size)
        total += (out * r**2 - r**3 / 3) + (out - r) * r**2 + 2 * r**2 * n
    return shape.n_layers * total


# Evaluation


def evaluation_peak(shape: Shape, setting: Setting, batch_windows: int) -> int:
    """Bytes of a batch of logits in bfloat16 and their log-softmax, and of two float32 copies of a window's."""
    tokens = batch_windows * setting.window_length
    return (4 * tokens + 8 * setting.window_length) * shape.vocabulary


def evaluation_flops(shape: Shape, size: float, tokens: int, window_length: int) -> float:
    """A forward pass over that many tokens, in windows of ``window_length``, of which the head predicts all."""
    layer = 2.0 * size * shape.n_parameters + 2 * shape.hidden * window_length
    return tokens * (shape.n_layers * layer + 2 * shape.vocabulary * shape.hidden)
