"""Are the compressed layers faster than the dense one? Ratios of times of one layer, beside what is possible at best.

``python -m benchmarks.pivot_layer``. All layers of a shape take turns, so that each finds the caches as another left
them, and ratios are medians of those within a turn; 1 is the dense layer. At 1 token a layer is bound by reading its
weights, and the limit is its share of the dense layer's bytes; at 512 tokens by arithmetic, and the limit is its share
of the multiply-adds. "order" is the pivot layer over itself with its outputs left as they are computed: what putting
each into its place costs, where 1 is nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import arguments, begin, interleaved, print_table, ratios, shown
from drank.model.layers import FactorLinear, PivotLinear

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # in, out: queries, gate and up, down of a Llama of 7B
SIZES = (0.8, 0.5)
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


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__, rounds=15)
    asked = parser.parse_args()
    begin(asked)
    torch.manual_seed(0)
    rows = []
    for n_in, n_out in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            dense = nn.Linear(n_in, n_out, bias=False, dtype=dtype)
            factors = {size: factor_layer(n_in, n_out, size, dtype) for size in SIZES}
            pivots = {size: pivot_layer(n_in, n_out, size, dtype) for size in SIZES}
            for n_tokens in (1, 512):
                x = torch.randn(n_tokens, n_in).to(dtype)
                runs: dict[str, Callable[[], object]] = {"dense": partial(dense, x)}
                runs |= {f"factors {size}": partial(layer, x) for size, layer in factors.items()}
                runs |= {f"pivot {size}": partial(layer, x) for size, layer in pivots.items()}
                # Last, so that none comes right after the layer whose weights it shares.
                runs |= {f"unordered {size}": partial(unordered, layer, x) for size, layer in pivots.items()}
                times = interleaved(runs, asked.rounds)
                for size, pivot in pivots.items():
                    places_in_weights = pivot.places.numel() * 4 / dtype.itemsize if n_tokens == 1 else 0
                    numbers = sum(parameter.numel() for parameter in pivot.parameters())
                    limit = (numbers + places_in_weights) / dense.weight.numel()
                    compared = (f"factors {size}", "dense"), (f"pivot {size}", "dense")
                    found = [ratios(times, *pair) for pair in (*compared, (f"pivot {size}", f"unordered {size}"))]
                    case = f"{n_in} x {n_out}, {str(dtype)[6:]}, {n_tokens} tokens, {size}"
                    rows.append([case, f"{limit:.3f}", *map(shown, found), shown(times["dense"], 1000, 1)])
    print_table(["in x out, type, tokens, size", "limit", "factors", "pivot", "order", "dense, ms"], rows)


if __name__ == "__main__":
    main()
