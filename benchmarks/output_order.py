"""How are the outputs of a pivot layer best put in order? Ratios of times to the layer's two products.

``python -m benchmarks.output_order``. The two parts of a layer's output, kept and rest, lie in memory as the products
leave them. The ways take turns; the limit is a copy of the output.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Times, arguments, begin, interleaved, print_table, ratios, shown
from benchmarks.pivot_layer import pivot_rank

SHAPES = ((4096, 4096, 0.8), (4096, 4096, 0.5), (576, 1536, 0.8), (576, 576, 0.5))  # in, out, size
TOKENS = (1, 512)


def index_copy(kept: Tensor, rest: Tensor, order: Tensor, _places: Tensor) -> Tensor:
    y = kept.new_empty(len(kept), len(order))
    return y.index_copy_(-1, order[: kept.shape[1]], kept).index_copy_(-1, order[kept.shape[1] :], rest)


def index_select(kept: Tensor, rest: Tensor, _order: Tensor, places: Tensor) -> Tensor:
    return torch.cat([kept, rest], -1).index_select(-1, places)


def gather(kept: Tensor, rest: Tensor, _order: Tensor, places: Tensor) -> Tensor:
    y = torch.cat([kept, rest], -1)
    return y.gather(-1, places.expand_as(y))


def copy(kept: Tensor, rest: Tensor, _order: Tensor, _places: Tensor) -> Tensor:
    return torch.cat([kept, rest], -1)


def products(x: Tensor, K: Tensor, C: Tensor) -> Tensor:
    return F.linear(F.linear(x, K), C)


@torch.inference_mode()
def main() -> None:
    asked = arguments(__doc__, rounds=21).parse_args()
    begin(asked)
    ways: tuple[Callable[..., Tensor], ...] = (index_copy, index_select, gather, copy)
    rows = []
    for n_in, n_out, size in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for n_tokens in TOKENS:
                times = measured(n_in, n_out, size, n_tokens, dtype, ways, asked.rounds)
                case = f"{n_in} x {n_out}, {size}, {str(dtype)[6:]}, {n_tokens} tokens"
                rows.append([case, *(shown(ratios(times, way.__name__, "products"), digits=3) for way in ways)])
    print_table(["in x out, size, type", *(way.__name__ for way in ways)], rows)


def measured(
    n_in: int,
    n_out: int,
    size: float,
    n_tokens: int,
    dtype: torch.dtype,
    ways: tuple[Callable[..., Tensor], ...],
    rounds: int,
) -> Times:
    rank = pivot_rank(n_in, n_out, size)
    x, K, C = (torch.randn(*s).to(dtype) for s in ((n_tokens, n_in), (rank, n_in), (n_out - rank, rank)))
    kept, rest, order = F.linear(x, K), products(x, K, C), torch.randperm(n_out)
    given = (kept, rest, order, order.argsort())
    alternatives: dict[str, Callable[[], Tensor]] = {"products": partial(products, x, K, C)}
    return interleaved(alternatives | {way.__name__: partial(way, *given) for way in ways}, rounds)


if __name__ == "__main__":
    main()
