"""How fast are compression and compressed models on a GPU? One file, plain torch, one table.

``python gpu.py [--part compression layer inference] [--json FILE]``, on any machine with a CUDA GPU. ``--device cpu
--tiny`` runs the same code in seconds, to test it. Random weights in bfloat16, shaped like Llama-2-7B and Llama-3-8B;
at most 70 GiB of GPU memory.

compression: every stage on some layers (``--layers``), times all layers; speed in TFLOP/s and as a share of the matrix
product of that type that this GPU showed in the same run. layer: forms of one linear. inference: whole models, blocks
compiled, one CUDA graph a step. Variants take turns; times are medians. A ratio is dense time over the variant's, so
more is better. docs/gpu.md says more.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[..., Tensor]
Layer = dict[str, tuple[Tensor, ...]]

SIZES = (0.8, 0.5)
AIMS = {0.8: 1.15, 0.5: 1.6}  # times the dense model's speed
AIM_SECONDS = 300  # of a whole compression
EIGH = 10 / 3  # n³ operations of a symmetric eigenproblem: reduction to tridiagonal form, and vectors back
PANEL = 1024  # rows of a covariance in one product
TOLERANCE = 2e-2  # of the largest output; bfloat16 rounds h to 4e-3
OWNERS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}  # who shares an input


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    name: str
    n_layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linears."""
        d, kv, m = self.hidden, self.kv_heads * self.head_size, self.mlp
        return {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d), "gate": (m, d), "up": (m, d), "down": (d, m)}

    @property
    def n_parameters(self) -> int:
        """FLOPs of a block's linears."""
        return sum(out * n for out, n in self.linears.values())


LLAMAS = (
    Shape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000),
    Shape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256),
)
TINY = (Shape("tiny Llama-2", 3, 64, 96, 4, 4, 96), Shape("tiny Llama-3", 3, 64, 112, 4, 2, 128))
TINY_SETTING = {
    "windows": 4, "window_length": 16, "batch_windows": 2, "prefill_batch": 2, "context": 8, "decode_batches": [1, 3],
    "steps": 2, "rounds": 2, "multiple_of": 4, "layer_tokens": [1, 5], "product_size": 64, "cache_mib": 0,
}  # fmt: skip


@dataclass
class Row:
    """A line of the table. Ratio: of the measured matrix product (compression), or to the dense one (the rest)."""

    part: str
    model: str
    case: str
    seconds: float | None = None
    gib: float | None = None
    rate: float | None = None
    unit: str = ""
    ratio: float | None = None
    note: str = ""


class Table:
    """Rows so far. A row that fails says why, and the others stand; the file is rewritten with every row."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.rows, self.failed = asked, list[Row](), False
        self.end = time.monotonic() + 60 * asked.minutes

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        if self.asked.json:
            about = {"device": device_name(self.asked.device), "torch": torch.__version__, "asked": vars(self.asked)}
            self.asked.json.write_text(
                json.dumps(about | {"rows": list(map(asdict, self.rows))}, indent=1, default=str)
            )

    def attempt(self, run: Callable[[], Any]) -> Any:
        """The result of run, or a sentence that says what went wrong."""
        if time.monotonic() > self.end:
            return f"not begun within {self.asked.minutes:g} minutes"
        try:
            return run()
        except Exception as error:  # whatever it is, an hour of a GPU is worth more than one row
            problem = "out of memory"
            if problem not in str(error).lower():
                traceback.print_exc()
                self.failed, problem = True, f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        release()  # here, where the traceback no longer holds tensors
        return problem

    def print(self) -> None:
        print("| part | model | what | ms | GiB | speed | of product / times dense | note |\n|" + "---|" * 8)
        print("\n".join(map(line, self.rows)))


def line(row: Row) -> str:
    ms = "" if row.seconds is None else f"{1000 * row.seconds:.4g}"
    gib = "" if row.gib is None else f"{row.gib:.2f}"
    rate = "" if row.rate is None else f"{row.rate:.4g} {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return "| " + " | ".join((row.part, row.model, row.case, ms, gib, rate, ratio, row.note)) + " |"


# Time and memory


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(run: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
    """Seconds, and the peak of GPU memory in GiB, what was there before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    spent = seconds(run, device)
    return spent, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def interleaved(runs: dict[Any, Any], rounds: int, table: Table) -> dict[Any, float | str]:
    """Median seconds of each, warmed up and in turns, of as many rounds as it did; a sentence where it did none."""
    times: dict[Any, list[float]] = {case: [] for case in runs}
    problems = {case: run for case, run in runs.items() if isinstance(run, str)}
    for turn in range(rounds + 1):
        for case, run in runs.items():
            if case not in problems:
                spent = table.attempt(partial(seconds, run, table.asked.device))
                if isinstance(spent, str):
                    problems[case] = spent
                elif turn:
                    times[case].append(spent)
    return {case: statistics.median(times[case]) if times[case] else problems[case] for case in runs}


def captured(run: Callable[[], Any], asked: argparse.Namespace, graphs: list[Any]) -> Callable[[], Any]:
    """The work of run as a CUDA graph, added to graphs; on a CPU run itself. They share memory: one runs at a time."""
    if not asked.graphs:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
        run()
    graphs.append(graph)
    return lambda _tensors_stay=run: graph.replay()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def products(table: Table) -> dict[torch.dtype, float]:
    """FLOP/s of square matrix products."""
    n, device, peaks = table.asked.product_size, table.asked.device, {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b)
        spent = min(seconds(run, device) for _ in range(6))
        peaks[dtype] = 2 * n**3 / spent
        table.add(Row("product", f"{n}³", str(dtype)[6:], spent, None, peaks[dtype] / 1e12, "TFLOP/s"))
    return peaks


# Forms of a linear layer: functions of x and of the tensors that `tensors` makes


def dense(x: Tensor, W: Tensor) -> Tensor:
    return F.linear(x, W)


def factors(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(F.linear(x, B), A)


def index_copy(x: Tensor, K: Tensor, C: Tensor, order: Tensor, _inverse: Tensor) -> Tensor:
    """y[order] = [K x; C K x], both parts straight to their places."""
    h = F.linear(x, K)
    y, n = h.new_empty(*h.shape[:-1], len(order)), h.shape[-1]
    return y.index_copy_(-1, order[:n], h).index_copy_(-1, order[n:], F.linear(h, C))


def gather(x: Tensor, K: Tensor, C: Tensor, _order: Tensor, inverse: Tensor) -> Tensor:
    """The same, put side by side and then in order: two passes over y, which a compiler may fuse."""
    h = F.linear(x, K)
    return torch.cat([h, F.linear(h, C)], -1).index_select(-1, inverse)


PIVOTS = {"index_copy": index_copy, "gather": gather}
FORMS: dict[str, Form] = {"dense": dense, "factors": factors, **PIVOTS}


def rank(form: str, out: int, n: int, size: float, multiple: int) -> int:
    """At which the form has `size` of the dense parameters: r (out + in), or r (out + in - r); rounded down."""
    total, wanted = out + n, size * out * n
    exact = wanted / total if form == "factors" else (total - (total**2 - 4 * wanted) ** 0.5) / 2
    return max(multiple, int(exact) // multiple * multiple)


def random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) / columns**0.5


def tensors(form: str, out: int, n: int, size: float, asked: argparse.Namespace) -> tuple[Tensor, ...]:
    if form == "dense":
        return (random(out, n, asked.device),)
    r = rank(form, out, n, size, asked.multiple_of)
    if form == "factors":
        return random(out, r, asked.device), random(r, n, asked.device)
    order = torch.randperm(out, device=asked.device)
    return random(r, n, asked.device), random(out - r, r, asked.device), order, order.argsort()


def check(form: str, x: Tensor, given: tuple[Tensor, ...]) -> None:
    """A pivot form against its definition, in float32.

    Raises:
        RuntimeError: the results differ.
    """
    if form not in PIVOTS:
        return
    K, C, order, _ = given
    h = F.linear(x, K).float()
    expected = torch.empty(*h.shape[:-1], len(order), device=x.device)
    expected[..., order] = torch.cat([h, F.linear(h, C.float())], -1)
    error = float((FORMS[form](x, *given).float() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"differs from the plain product by {error:.2g} of the largest output")


# A decoder block, as a function


def block(x: Tensor, linear: Callable[[str, Tensor], Tensor], shape: Shape, rotary: Tensor, kv: Any = None) -> Tensor:
    """x (batch, tokens, hidden). kv = (keys, values, positions): a static cache that is written at the positions; a
    single token attends to all of it. The norms have no weight."""
    batch, length, _ = x.shape
    h = normed(x)
    q, k, v = (linear(name, h).view(batch, length, -1, shape.head_size).transpose(1, 2) for name in "qkv")
    q, k = rotated(q, rotary), rotated(k, rotary)
    if kv is not None:
        keys, values, positions = kv
        keys[:, :, positions], values[:, :, positions] = k, v
        k, v = (keys, values) if length == 1 else (k, v)
    grouped = {"enable_gqa": True} if shape.heads != shape.kv_heads else {}
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, **grouped)
    x = x + linear("o", attended.transpose(1, 2).reshape(batch, length, -1))
    h = normed(x)
    return x + linear("down", F.silu(linear("gate", h)) * linear("up", h))


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * rotary[0] + torch.cat([-right, left], -1) * rotary[1]


def rotary_of(shape: Shape, positions: Tensor) -> Tensor:
    frequencies = 1e4 ** (-torch.arange(0, shape.head_size, 2, device=positions.device) / shape.head_size)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).bfloat16()


def block_of(x: Tensor, layer: Layer, form: Form, shape: Shape, rotary: Tensor, kv: Any) -> Tensor:
    return block(x, lambda name, h: form(h, *layer[name]), shape, rotary, kv)


# Compression


@cache
def mixed_products(device: torch.device) -> bool:
    """True if this torch multiplies bfloat16 into float32."""
    a = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.mm(a, a, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def add_moment(total: Tensor, x: Tensor) -> None:
    """total += xᵀ x in float32, on and above the diagonal, as in drank.method.covariance. Products of bfloat16 numbers
    are exact in TF32 units too."""
    mixed, before = mixed_products(x.device), torch.backends.cuda.matmul.allow_tf32
    rows, wide = (x.flatten(0, -2), {"out_dtype": torch.float32}) if mixed else (x.flatten(0, -2).float(), {})
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for i in range(0, len(total), PANEL):
            total[i : i + PANEL, i:] += torch.mm(rows[:, i : i + PANEL].T, rows[:, i:], **wide)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def moment_flops(d: int) -> int:
    """A token."""
    return sum(2 * min(PANEL, d - i) * (d - i) for i in range(0, d, PANEL))


class Calibration:
    """Inputs of a block, and its outputs or their gradients, of all windows: on the CPU, a batch a time on the GPU."""

    def __init__(self, shape: Shape, asked: argparse.Namespace) -> None:
        self.shape, self.asked, self.device = shape, asked, asked.device
        size, pin = (asked.windows, asked.window_length, shape.hidden), asked.device.type == "cuda"
        self.inputs, self.outputs = (torch.empty(size, dtype=torch.bfloat16, pin_memory=pin) for _ in range(2))
        for batch in self.inputs.split(asked.batch_windows):
            batch.copy_(torch.randn(batch.shape, device=self.device, dtype=torch.bfloat16))
        self.rotary = rotary_of(shape, torch.arange(asked.window_length, device=self.device))
        self.layer = {name: random(*sides, self.device) for name, sides in shape.linears.items()}

    def zeros(self, of: str) -> dict[str, Tensor]:
        side = {name: n for name, (_, n) in self.shape.linears.items() if OWNERS[name] == name}
        if of == "gradients":
            side = {name: out for name, (out, _) in self.shape.linears.items()}
        return {name: torch.zeros(n, n, device=self.device) for name, n in side.items()}

    def batches(self, n: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        both = (x.split(self.asked.batch_windows)[:n] for x in (self.inputs, self.outputs))
        return zip(*both, strict=True)

    @torch.no_grad()
    def forward(self, n_batches: int | None = None) -> dict[str, Tensor]:
        """Sums of x xᵀ over all inputs of a block; its outputs go to the CPU."""
        sums = self.zeros("inputs")

        def linear(name: str, x: Tensor) -> Tensor:
            if name in sums:
                add_moment(sums[name], x)
            return F.linear(x, self.layer[name])

        for x, y in self.batches(n_batches):
            y.copy_(block(x.to(self.device, non_blocking=True), linear, self.shape, self.rotary), non_blocking=True)
        return sums

    def backward(self, n_batches: int | None = None) -> dict[str, Tensor]:
        """Sums of g gᵀ over the gradients of all linears' outputs, the block recomputed; the gradient of its inputs
        takes the place of that of its outputs."""
        sums = self.zeros("gradients")

        def linear(name: str, x: Tensor) -> Tensor:
            y = F.linear(x, self.layer[name])

            def add(g: Tensor) -> None:
                add_moment(sums[name], g)

            y.register_hook(add)
            return y

        for x, g in self.batches(n_batches):
            given = x.to(self.device, non_blocking=True).requires_grad_(True)
            y = block(given, linear, self.shape, self.rotary)
            y.backward(g.to(self.device, non_blocking=True))
            g.copy_(given.grad, non_blocking=True)
        return sums

    def head(self, head: Tensor, n_windows: int) -> None:
        """Gradients of hidden states, from a normal draw with the covariance of the Fisher matrix, a window a time."""
        for x, g in zip(self.inputs[:n_windows], self.outputs[:n_windows], strict=True):
            given = x.to(self.device).requires_grad_(True)
            logits = F.linear(normed(given), head).float()
            with torch.no_grad():
                p = logits.softmax(-1)
                noise = torch.randn_like(p).mul_(p.sqrt())
                noise.addcmul_(p, noise.sum(-1, keepdim=True), value=-1)
            logits.backward(noise)
            g.copy_(given.grad)

    def flops(self, stage: str) -> float:
        """FLOPs of a block. Causal attention has 2 · hidden · length per token, and 2.5 times as many backward; the
        linears, whose weights need no gradient, once as many."""
        tokens = self.asked.windows * self.asked.window_length
        attention = 2 * self.shape.hidden * self.asked.window_length
        passes = 2 * self.shape.n_parameters + attention
        if stage == "forward":
            return tokens * (
                passes + sum(moment_flops(n) for s, (_, n) in self.shape.linears.items() if OWNERS[s] == s)
            )
        backward = 2 * self.shape.n_parameters + 2.5 * attention
        return tokens * (passes + backward + sum(moment_flops(out) for out, _ in self.shape.linears.values()))


def components(W: Tensor, near: Tensor | None, far: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, and rank-one parts of W, from the eigenproblem of its columns' side: as in drank.method.spectrum."""
    gram = W.T @ (W if far is None else far @ W)
    root = None if near is None else square_root(near)
    energies, V = descending_eigh(gram if root is None else root @ gram @ root)
    a = V if root is None else root @ V
    floor = energies[0] * (1e-13 if W.dtype == torch.float64 else 1e-6)
    return energies, (W @ a).T, (gram @ a / energies.clamp_min(floor)).T


def spectrum(W: Tensor, H: Tensor | None, G: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, vectors (r, out) and (r, in), of G^½ W H^½; the smaller eigenproblem."""
    if len(W) <= W.shape[1]:
        energies, right, left = components(W.T, G, H)
        return energies, left, right
    return components(W, H, G)


def square_root(metric: Tensor) -> Tensor:
    energies, vectors = descending_eigh(metric)
    return (vectors * energies.sqrt()) @ vectors.T


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    energies, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return energies.flip(0).clamp_min(0), vectors.flip(1)


def spectrum_flops(out: int, n: int, kfac: bool) -> float:
    d, e = min(out, n), max(out, n)
    near, far = kfac or out > n, kfac or out <= n
    return 2 * d * d * e + 2 * d * e * e * far + (2 * EIGH + 8 if near else EIGH) * d**3 + 2 * e * d * d + 2 * d**3


def metric(n: int, device: torch.device) -> Tensor:
    """A covariance whose energies fall by six decades or more."""
    mix = torch.randn(n, n, device=device, dtype=torch.float64) / n**0.5
    return (mix * torch.logspace(0, -6, n, device=device, dtype=torch.float64)) @ mix.T


def excess_loss(W: Tensor, H: Tensor, G: Tensor | None, parts: Sequence[Tensor], rank: int) -> float:
    """Loss of factors of less precision at a rank, over the loss of the best ones, less 1."""
    best = spectrum(W, H, G)[0][rank:].sum()
    D = W - parts[1][:rank].double().T @ parts[2][:rank].double()
    return float(((D if G is None else G @ D) * (D @ H)).sum() / best) - 1


def pivot_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K (r, in), C (out - r, r), order (out,): (left @ right)[order] = [K; C K]. Rows by LU with partial pivoting."""
    r = left.shape[1]
    lu, swaps = torch.linalg.lu_factor(left)
    order = list(range(len(left)))
    for i, j in enumerate((swaps - 1).tolist()):
        order[i], order[j] = order[j], order[i]
    C = torch.linalg.solve_triangular(lu[:r], lu[r:], upper=False, left=False, unitriangular=True)
    taken = torch.tensor(order, device=left.device)
    return left[taken[:r]] @ right, C, taken


class Compression:
    """The stages of one model. Each is timed on parts of the work, which stand for so many times themselves."""

    def __init__(self, shape: Shape, table: Table, peaks: dict[torch.dtype, float]) -> None:
        self.shape, self.table, self.asked, self.peaks = shape, table, table.asked, peaks
        self.device, self.seconds = self.asked.device, dict[str, float | None]()
        self.n_sampled = shape.n_layers if self.asked.layers == "all" else min(int(self.asked.layers), shape.n_layers)
        self.scale = shape.n_layers / self.n_sampled
        self.sampled = "" if self.scale == 1 else f"{self.n_sampled} of {shape.n_layers} layers, scaled"

    def run(self) -> None:
        self.table.attempt(self.load_libraries)
        calibration = self.table.attempt(partial(Calibration, self.shape, self.asked))
        if isinstance(calibration, str):
            self.add("covariances", calibration)
        else:
            self.covariance(calibration)
            del calibration
        for kfac in (False, True):
            for dtype in (torch.float64, torch.float32):
                self.spectrum(kfac, dtype)
        self.stage("pivot rows at 0.8, float64", self.pivot_parts, self.sampled)
        self.stage("slicing at 0.8, from CPU to bfloat16 on the device", self.slicing_parts, self.sampled)
        covariance, head, backward = ("covariance, inputs", "head, gradients of the loss", "covariance, gradients")
        for precision in ("float64", "float32"):
            spectrum = f"spectrum, input metric, {precision}"
            self.whole(f"input metric, factors, {precision}", covariance, spectrum, "slicing")
            spectrum = f"spectrum, kfac, {precision}"
            self.whole(f"kfac, pivot, {precision}", covariance, head, backward, spectrum, "pivot rows")

    def load_libraries(self) -> None:
        for dtype in (torch.float32, torch.float64):
            square_root(torch.eye(64, device=self.device, dtype=dtype))
        half = torch.eye(64, device=self.device, dtype=torch.float64)[:, :32]
        pivot_rows(half, half.T)

    def add(self, case: str, note: str, seconds: float | None = None, gib: float | None = None, **speed: Any) -> None:
        self.seconds[case] = seconds
        self.table.add(Row("compression", self.shape.name, case, seconds, gib, note=note, **speed))

    def stage(
        self, case: str, parts: Callable[[], Any], note: str, flops: float = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """parts yields (what to time, how often the model has it); flops are the whole model's."""
        release()
        done = self.table.attempt(lambda: [(*measured(part, self.device), times) for part, times in parts()])
        if isinstance(done, str):
            self.add(case, done)
            return
        total, gib = sum(spent * times for spent, _, times in done), max((g for _, g, _ in done if g), default=None)
        rate = flops / total
        speed = {"rate": rate / 1e12, "unit": "TFLOP/s", "ratio": rate / self.peaks[dtype]} if flops else {}
        self.add(case, note, total, gib, **speed)

    def covariance(self, calibration: Calibration) -> None:
        n_layers, asked = self.shape.n_layers, self.asked
        head, some = random(self.shape.vocabulary, self.shape.hidden, self.device), min(asked.windows, 8)
        tokens = asked.windows * asked.window_length

        def sweeps(of: Callable[..., object]) -> Iterator[tuple[Callable[[], object], float]]:
            of(1)  # one batch, so that libraries are loaded
            yield lambda: [of() for _ in range(self.n_sampled)], self.scale

        flops = n_layers * calibration.flops("forward")
        self.stage("covariance, inputs", partial(sweeps, calibration.forward), f"forward; {self.sampled}", flops)
        times, note = asked.windows / some, f"{some} of {asked.windows} windows, scaled"
        heads = partial(calibration.head, head, some)
        self.stage("head, gradients of the loss", lambda: [(heads, times)], note, 4 * tokens * head.numel())
        flops, note = n_layers * calibration.flops("backward"), f"recompute, backward; {self.sampled}"
        self.stage("covariance, gradients", partial(sweeps, calibration.backward), note, flops)

    def linears(self) -> list[tuple[int, int, int]]:
        """(out, in, how many in the model), each shape once."""
        return [(out, n, m * self.shape.n_layers) for (out, n), m in Counter(self.shape.linears.values()).items()]

    def spectrum(self, kfac: bool, dtype: torch.dtype) -> None:
        errors: list[float] = []

        def parts() -> Iterator[tuple[Callable[[], object], float]]:
            for out, n, times in self.linears():
                W, H = random(out, n, self.device).double(), metric(n, self.device)
                G = metric(out, self.device) if kfac else None
                given = (W.to(dtype), H.to(dtype), None if G is None else G.to(dtype))
                yield lambda given=given: [spectrum(*given) for _ in range(self.n_sampled)], times / self.n_sampled
                if dtype == torch.float32 and (out, n) == self.shape.linears["k"]:
                    at = rank("factors", out, n, 0.8, self.asked.multiple_of)
                    errors.append(excess_loss(W, H, G, spectrum(*given), at))

        flops = sum(times * spectrum_flops(out, n, kfac) for out, n, times in self.linears())
        case = f"spectrum, {'kfac' if kfac else 'input metric'}, {str(dtype)[6:]}"
        self.stage(case, parts, self.sampled, flops, dtype)
        if errors:
            self.add(f"{case}: loss at 0.8 of a key matrix, over float64's, less 1", f"{errors[0]:.2g}")

    def pivot_parts(self) -> Iterator[tuple[Callable[[], object], float]]:
        for out, n, times in self.linears():
            r = rank("pivot", out, n, 0.8, self.asked.multiple_of)
            left, right = random(out, r, self.device).double(), random(r, n, self.device).double()
            yield (
                lambda left=left, right=right: [pivot_rows(left, right) for _ in range(self.n_sampled)],
                times / self.n_sampled,
            )

    def slicing_parts(self) -> Iterator[tuple[Callable[[], object], float]]:
        for out, n, times in self.linears():
            r = rank("factors", out, n, 0.8, self.asked.multiple_of)
            cached = [torch.randn(min(out, n), side) for side in (out, n)]
            yield lambda cached=cached, r=r: [x[:r].to(self.device).bfloat16() for x in cached], times

    def whole(self, name: str, *stages: str) -> None:
        """The sum of the stages whose names begin so."""
        found = [
            s for stage in stages for case, s in self.seconds.items() if case.startswith(stage) and ":" not in case
        ]
        if len(found) < len(stages) or None in found:
            self.add(f"whole: {name}", "a stage is missing")
        else:
            self.add(f"whole: {name}", aim(sum(found) <= AIM_SECONDS, f"at most {AIM_SECONDS} s"), sum(found))


def aim(met: bool, text: str) -> str:
    return f"aim {text}: {'met' if met else 'missed'}"


# One layer


def compiled(run: Callable[..., Any], asked: argparse.Namespace) -> Callable[..., Any]:
    return torch.compile(run, dynamic=False) if asked.compile else run


def pivot_layer(table: Table, shape: Shape) -> None:
    """Every form of one linear, by itself, at a few numbers of tokens."""
    forms = {name: (name, form) for name, form in FORMS.items() if name != "dense"}
    if table.asked.compile:
        forms["gather, compiled"] = "gather", compiled(gather, table.asked)
    for out, n in dict.fromkeys(shape.linears[name] for name in ("q", "gate", "down")):
        for tokens in table.asked.layer_tokens:
            cases = {("dense", 1.0): ("dense", dense)} | {(name, s): forms[name] for s in SIZES for name in forms}
            graphs: list[Any] = []
            runs = {
                case: table.attempt(partial(layer_run, *given, out, n, case[1], tokens, table.asked, graphs))
                for case, given in cases.items()
            }
            times = interleaved(runs, table.asked.rounds, table)
            whole = times["dense", 1.0]
            for (name, size), spent in times.items():
                row = Row("layer", f"{n} to {out}, {tokens} tokens", f"{name} {size}")
                if isinstance(spent, str):
                    row.note = spent
                else:
                    row.seconds = spent / n_copies(out, n, table.asked)
                    row.ratio = None if isinstance(whole, str) else whole / spent
                table.add(row)
            del runs, graphs
            release()


def n_copies(out: int, n: int, asked: argparse.Namespace) -> int:
    """As many layers in a row as no cache holds, at half size."""
    return 1 + int(asked.cache_mib * 2**20 / (out * n))


def layer_run(
    name: str, form: Form, out: int, n: int, size: float, tokens: int, asked: argparse.Namespace, graphs: list[Any]
) -> Callable[[], Any]:
    layers = [tensors(name, out, n, size, asked) for _ in range(n_copies(out, n, asked))]
    x = torch.randn(tokens, n, device=asked.device, dtype=torch.bfloat16)
    check(name, x, layers[0])
    return captured(lambda: [form(x, *layer) for layer in layers] and None, asked, graphs)


# Whole models


@dataclass
class Model:
    """Blocks of one form; embeddings and head are those of all models of a shape."""

    shape: Shape
    form: str
    layers: list[Layer]
    embeddings: Tensor
    head: Tensor

    def step(self, length: int, batch: int, cache: list[tuple[Tensor, Tensor]], asked: Any) -> Callable[[], Tensor]:
        """length > 1: prefill of the cache. 1: decoding of one token, whose place in the cache is the last."""
        context, device = cache[0][0].shape[2], asked.device
        ids = torch.randint(self.shape.vocabulary, (batch, length), device=device)
        positions = torch.arange(context - length, context, device=device)
        rotary, run = rotary_of(self.shape, positions), compiled(block_of, asked)

        def step() -> Tensor:
            x = F.embedding(ids, self.embeddings)
            for layer, (keys, values) in zip(self.layers, cache, strict=True):
                x = run(x, layer, FORMS[self.form], self.shape, rotary, (keys, values, positions))
            ids[:, -1] = F.linear(normed(x[:, -1]), self.head).argmax(-1)
            return ids

        return step


def models(shape: Shape, table: Table) -> dict[tuple[str, float], Any]:
    """By form and size, or why there is none. Pivot forms of a size share their weights."""
    asked, made = table.asked, {}
    ends = table.attempt(lambda: [random(shape.vocabulary, shape.hidden, asked.device) for _ in range(2)])
    if isinstance(ends, str):
        return {("dense", 1.0): ends}

    def make(form: str, size: float) -> Model:
        sides = shape.linears.items()
        layers = [{k: tensors(form, *v, size, asked) for k, v in sides} for _ in range(shape.n_layers)]
        return Model(shape, form, layers, *ends)

    made["dense", 1.0] = table.attempt(partial(make, "dense", 1.0))
    for size in SIZES:
        made["factors", size] = table.attempt(partial(make, "factors", size))
        first = table.attempt(partial(make, asked.pivot[0], size))
        for form in asked.pivot:
            made[form, size] = first if isinstance(first, str) else replace(first, form=form)
    return made


def inference(shape: Shape, table: Table) -> None:
    asked = table.asked
    made = models(shape, table)
    workloads = [("prefill", asked.prefill_batch, asked.window_length)]
    workloads += [("decode", batch, 1) for batch in asked.decode_batches]
    for name, batch, length in workloads:
        release()
        runs = ready(made, name, batch, length, table)
        times = interleaved(runs, asked.rounds, table)
        whole = times["dense", 1.0]
        for (form, size), spent in times.items():
            row = Row("inference", shape.name, f"{name}, {batch} x {length}, {form} {size}")
            if isinstance(spent, str):
                row.note = spent
            else:
                row.seconds = spent if length > 1 else spent / asked.steps
                row.rate, row.unit = batch * length / row.seconds, "tokens/s"
                if form != "dense" and not isinstance(whole, str):
                    row.ratio = whole / spent
                    row.note = aim(row.ratio >= AIMS[size], f"at least {AIMS[size]}")
            table.add(row)
        del runs


def ready(made: dict[tuple[str, float], Any], name: str, batch: int, length: int, table: Table) -> dict[Any, Any]:
    """For every model a function that runs the workload, or why there is none. They take turns with one cache."""
    asked = table.asked
    shape = next((model.shape for model in made.values() if isinstance(model, Model)), None)
    if shape is None:
        return dict(made)
    context = length if name == "prefill" else asked.context
    size = (batch, shape.kv_heads, context, shape.head_size)
    zeros = partial(torch.zeros, size, device=asked.device, dtype=torch.bfloat16)
    cache = table.attempt(lambda: [(zeros(), zeros()) for _ in range(shape.n_layers)])
    if isinstance(cache, str):
        return dict.fromkeys(made, cache)
    graphs: list[Any] = []

    def prepare(model: Model) -> Callable[[], Any]:
        q = model.layers[0]["q"]
        check(model.form, torch.randn(batch, length, shape.hidden, device=asked.device).bfloat16(), q)
        step = captured(model.step(length, batch, cache, asked), asked, graphs)
        return step if length > 1 else lambda: [step() for _ in range(asked.steps)]

    return {
        case: model if isinstance(model, str) else table.attempt(partial(prepare, model))
        for case, model in made.items()
    }


PARTS = ("compression", "layer", "inference")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, help="where rows go, as they come")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="small shapes and settings, to test the script")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="blocks without torch.compile")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="steps without CUDA graphs")
    parser.add_argument("--layers", default="2", help="layers that compression is measured on, or all")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is begun later")
    parser.add_argument("--memory-gib", type=float, default=70.0, help="of the GPU, at most")
    parser.add_argument("--pivot", nargs="+", choices=PIVOTS, default=["gather"], help="forms of whole models")
    for name, value in {
        "windows": 256, "window_length": 2048, "batch_windows": 8, "prefill_batch": 4, "context": 512, "steps": 32,
        "rounds": 5, "multiple_of": 64, "product_size": 8192, "cache_mib": 1024,
    }.items():  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value, help=f"default {value}")
    parser.add_argument("--decode-batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--layer-tokens", nargs="+", type=int, default=[1, 4096])
    asked = parser.parse_args(given)
    if asked.tiny:
        vars(asked).update(TINY_SETTING)
    if asked.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --device cpu --tiny tests the script")
    asked.compile, asked.graphs = (wanted and asked.device.type == "cuda" for wanted in (asked.compile, asked.graphs))
    return asked


def main(given: Sequence[str] | None = None) -> int:
    asked = arguments(given)
    torch.manual_seed(0)
    if asked.device.type == "cuda":
        total = torch.cuda.get_device_properties(asked.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.memory_gib * 2**30 / total), asked.device)
    for limit in ("recompile_limit", "cache_size_limit"):  # its older name; one block is compiled for many shapes
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 256)
    table, shapes = Table(asked), TINY if asked.tiny else LLAMAS
    peaks = products(table)
    for shape in shapes:
        if "compression" in asked.part:
            Compression(shape, table, peaks).run()
    with torch.no_grad():
        if "layer" in asked.part:
            pivot_layer(table, shapes[0])
        for shape in shapes:
            if "inference" in asked.part:
                inference(shape, table)
    print(f"{device_name(asked.device)}, torch {torch.__version__}\n")
    table.print()
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())
