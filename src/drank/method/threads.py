"""Small matrices side by side, each in one thread, in the place of all threads in one small matrix."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

# Largest width of a matrix that is small: a product or a factorisation of it gains nothing by a second thread, and
# an eigenproblem loses (docs/log.md). As many matrices as there are threads must have room in memory.
SMALL = 2048

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], width: int | float) -> Iterator[Result]:
    """``function`` of every item, in order, without gradients; as many items at a time as torch has threads, each of
    them in one thread, if they are small.

    Results are then those of one thread, whatever the number of threads. No item after one that fails is begun.

    Args:
        width: the largest width of an item's matrices.
    """
    function = torch.no_grad()(function)
    if width > SMALL:
        yield from map(function, items)
        return
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(n_threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)
