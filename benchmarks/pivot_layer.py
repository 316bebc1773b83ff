"""Are the compressed layers faster than the dense one? Ratios of times of one layer, beside what is possible at best.

``python -m benchmarks.pivot_layer``. All layers of a shape take turns, so that each finds the caches as another left
them, and ratios are medians of those within a turn; 1 is the dense layer. At 1 token a layer is bound by reading its
weights, and the limit is its share of the dense layer's bytes; at 512 tokens by arithmetic, and the limit is its share
of the multiply-adds. "order" is the pivot layer over itself with its outputs left as they are computed: what putting
each into its place costs, where 1 is nothing.
"""

import time
from collections.abc import Callable
from functools import partial
from operator import truediv
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drank.model.benchmark import round_robin
from drank.model.layers import FactorLinear, PivotLinear

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # in, out: queries, gate and up, down of a Llama of 7B
SIZES = (0.8, 0.5)
ROUNDS = {1: 41, 512: 15}
MULTIPLE = 32  # of ranks, as in the preset kfac-aligned


def factor_rank(n_in: int, n_out: int, size: float) -> int:
    """The aligned rank at which r (out + in) parameters are at most a share of the dense layer's."""
    return int(size * n_in * n_out / (n_in + n_out)) // MULTIPLE * MULTIPLE


def pivot_rank(n_in: int, n_out: int, size: float) -> int:
    """The aligned rank at which r (out + in - r) parameters are at most a share of the dense layer's."""
    total = n_in + n_out
    return int((total - (total**2 - 4 * size * n_in * n_out) ** 0.5) / 2) // MULTIPLE * MULTIPLE


def factor_layer(n_in: int, n_out: int, size: float, dtype: torch.dtype) -> FactorLinear:
    rank = factor_rank(n_in, n_out, size)
    layer = FactorLinear(n_in, n_out, rank, bias=False, dtype=dtype)
    layer.load_state_dict({"weight": random(n_out, rank, dtype), "basis": random(rank, n_in, dtype)})
    return layer


def pivot_layer(n_in: int, n_out: int, size: float, dtype: torch.dtype) -> PivotLinear:
    rank = pivot_rank(n_in, n_out, size)
    layer = PivotLinear(n_in, n_out, rank, bias=False, dtype=dtype, in_order=False)
    kept, coefficients = random(rank, n_in, dtype), random(n_out - rank, rank, dtype)
    layer.load_state_dict({"weight": kept, "coefficients": coefficients, "places": torch.randperm(n_out)})
    return layer


def random(n_rows: int, n_columns: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n_rows, n_columns) / n_columns**0.5).to(dtype)


def unordered(layer: PivotLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    kept = F.linear(x, layer.weight)
    return kept, F.linear(kept, layer.coefficients)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print("in x out, type, tokens, size    limit   factors   pivot   order    (dense ms)")
    for n_in, n_out in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            dense = nn.Linear(n_in, n_out, bias=False, dtype=dtype)
            layers = {
                (size, name): make(n_in, n_out, size, dtype)
                for size in SIZES
                for name, make in (("factors", factor_layer), ("pivot", pivot_layer))
            }
            for n_tokens, rounds in ROUNDS.items():
                x = torch.randn(n_tokens, n_in).to(dtype)
                runs: dict[tuple[float, str], Callable[[], object]] = {(1.0, "dense"): partial(dense, x)}
                runs |= {case: partial(layer, x) for case, layer in layers.items()}
                # Last, so that none comes right after the layer whose weights it shares.
                runs |= {(size, "unordered"): partial(unordered, layers[size, "pivot"], x) for size in SIZES}
                times = round_robin({case: partial(seconds, run) for case, run in runs.items()}, rounds)
                for size in SIZES:
                    pivot = layers[size, "pivot"]
                    places_in_weights = pivot.places.numel() * 4 / dtype.itemsize if n_tokens == 1 else 0
                    numbers = sum(parameter.numel() for parameter in pivot.parameters())
                    limit = (numbers + places_in_weights) / dense.weight.numel()
                    factors, whole, order = (
                        median(map(truediv, times[size, name], times[reference]))
                        for name, reference in (
                            ("factors", (1.0, "dense")),
                            ("pivot", (1.0, "dense")),
                            ("pivot", (size, "unordered")),
                        )
                    )
                    print(
                        f"{n_in:5} x {n_out:5}, {str(dtype)[6:]:8}, {n_tokens:3}, {size}    {limit:.3f}   "
                        f"{factors:7.2f}   {whole:5.2f}   {order:5.2f}    "
                        f"({1000 * median(times[1.0, 'dense']):.1f})"
                    )


if __name__ == "__main__":
    main()
