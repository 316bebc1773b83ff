"""How fast this machine multiplies: a process of its own, ``python -m drank.planning.machine DTYPE THREADS:DEVICE...``.

It prints a list of speeds, one per place, in about a second each; neither torch nor the memory of a GPU is left behind.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from drank.planning.footprint import EIGH


@dataclass(frozen=True)
class Speed:
    """FLOP/s of products of square matrices, and of eigenproblems of symmetric ones in float64.

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

    from drank.method.threads import side_by_side
    from drank.model.precision import compute_dtype, name_of

    dtype = compute_dtype(asked, device)
    torch.set_num_threads(threads)
    n = 4096 if device == "cuda" else 1024  # about as wide as what stages multiply

    def seconds(run: Callable[[], torch.Tensor], within: float = 0.3) -> float:
        """The fastest run, of as many as there is time for after a first one: others' work comes and goes."""
        times: list[float] = []
        while sum(times[1:]) < within:
            start = time.perf_counter()
            run().flatten()[0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times[1:])

    def product(dtype: torch.dtype) -> float:
        A = torch.randn(n, n, device=device).to(dtype)
        return 2 * n**3 / seconds(lambda: A @ A)

    S = torch.randn(512, 512, dtype=torch.float64, device=device)
    S = S @ S.T
    several = [S] * (threads if device == "cpu" else 1)  # as the step spectrum solves them
    solved = seconds(lambda: [found.eigenvalues for found in side_by_side(torch.linalg.eigh, several, 512)][-1])
    eigenproblem = len(several) * EIGH * 512**3 / solved
    return Speed(name_of(dtype), product(dtype), product(torch.float64), eigenproblem)


if __name__ == "__main__":
    places = (place.split(":") for place in sys.argv[2:])
    sys.stdout.write(json.dumps([asdict(measure(int(threads), device, sys.argv[1])) for threads, device in places]))
