"""Do directions of almost no energy (denormal numbers) slow the spectrum? Ratio of times to a well-scaled covariance.

``python -m benchmarks.denormal_directions``. A processor may take a hundred times as long for an operation on denormal
numbers. Covariances are stored in float32, whose denormals (below 1e-38) are ordinary numbers in float64, in which
everything is computed; the cases below 1e-308 are denormal in float64 too. 1 is no slowdown.
"""

import torch

from benchmarks.measure import seconds
from drank.method.spectrum import whitened_spectrum

SIZE, REPEATS = 576, 5


def fastest(W: torch.Tensor, H: torch.Tensor) -> float:
    return min(seconds(lambda: whitened_spectrum(W, H, H)) for _ in range(REPEATS))


def main() -> None:
    torch.manual_seed(0)
    W = torch.randn(SIZE, SIZE)
    x = torch.randn(4 * SIZE, SIZE, dtype=torch.float64)
    well_scaled = x.T @ x / len(x)
    rotation = torch.linalg.qr(x[:SIZE])[0]
    reference = fastest(W, well_scaled)
    for smallest in (-45, -160, -320):
        energies = torch.logspace(0, smallest, SIZE, dtype=torch.float64)
        rotated = (rotation * energies) @ rotation.T
        for name, H in (("diagonal", torch.diag(energies)), ("rotated", (rotated + rotated.T) / 2)):
            print(f"energies from 1 to 1e{smallest}, {name}: {fastest(W, H) / reference:.2f}")
    print(f"everything times 1e-315: {fastest(W, well_scaled * 1e-315) / reference:.2f}")


if __name__ == "__main__":
    main()
