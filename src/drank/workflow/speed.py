"""How fast this machine multiplies: about a second of measuring."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from drank.footprint import EIGH


@dataclass(frozen=True)
class Speed:
    """FLOP/s of products of square matrices, and of the eigenproblem of a symmetric one in float64."""

    float32: float
    bfloat16: float
    float64: float
    eigenproblem: float


def measure(threads: int, device: str) -> Speed:
    """This machine's, with that many threads, which this process has from then on."""
    import torch

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
    return Speed(product(torch.float32), product(torch.bfloat16), product(torch.float64), eigenproblem)


def _seconds(run: Callable[[], object], wait: Callable[[], None], within: float = 0.2) -> float:
    """Median time of a run, of as many as there is time for after a first one."""
    run()
    wait()
    times: list[float] = []
    while sum(times) < within:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
