"""How fast this machine multiplies: about a second of measuring."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from drank.planning.footprint import EIGH


@dataclass(frozen=True)
class Speed:
    """FLOP/s of products of square matrices, and of the eigenproblem of a symmetric one in float64.

    Attributes:
        dtype: the type that passes are computed in, which ``passes`` is of.
    """

    dtype: str
    passes: float
    float64: float
    eigenproblem: float


def measure(threads: int, device: str, asked: str) -> Speed:
    """This machine's, with that many threads, which this process has from then on, and passes in the type asked for."""
    import torch

    from drank.model.precision import compute_dtype, name_of

    dtype = compute_dtype(asked, device)
    torch.set_num_threads(threads)
    n = 4096 if device == "cuda" else 1024  # about as wide as what stages multiply

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def product(dtype: torch.dtype) -> float:
        A = torch.randn(n, n, device=device).to(dtype)
        return 2 * n**3 / _seconds(lambda: A @ A, wait)

    S = torch.randn(512, 512, dtype=torch.float64, device=device)
    S = S @ S.T
    eigenproblem = EIGH * 512**3 / _seconds(lambda: torch.linalg.eigh(S), wait)
    return Speed(name_of(dtype), product(dtype), product(torch.float64), eigenproblem)


def _seconds(run: Callable[[], object], wait: Callable[[], None], within: float = 0.3) -> float:
    """The fastest run, of as many as there is time for after a first one: what others do meanwhile comes and goes."""
    run()
    wait()
    times: list[float] = []
    while sum(times) < within:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)
