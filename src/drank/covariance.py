"""Covariances of inputs, H = E[x xᵀ], and of output gradients, G = E[g gᵀ], streamed. Knows tensors only.

Precision: activations are bfloat16 or float32; products are summed in float32 within a batch and in float64 across
batches. Products of bfloat16 numbers are exact in float32, so the multiplication itself runs in bfloat16 units. The
float32 sum has a *componentwise* bound, |ΔH_ij| <= n ε Σ|x_i||x_j| with n the tokens of a batch, so a channel of huge
activations cannot drown the others; float64 across batches keeps the error from growing with the number of windows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


class NotFiniteError(ValueError):
    """A NaN or an infinity where numbers were expected; the message says where and how many."""


class SecondMoment:
    r"""Running second moment of rows.

    .. math:: H = \frac{1}{n} \sum_{t=1}^{n} x_t x_t^\top

    x_t of shape (d,), H (d, d) float64, symmetric, positive semidefinite up to rounding, and the same up to rounding
    whatever the batching.
    """

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, size, dtype=torch.float64)
        self.magnitude = torch.zeros(size, dtype=torch.float64)
        self.n_tokens = 0

    def add(self, x: Float[Tensor, "tokens size"]) -> None:
        """Take in a batch of rows."""
        rows = x.float()
        with _products_in_bfloat16() if x.dtype == torch.bfloat16 else nullcontext():
            self.total += rows.T @ rows
        self.magnitude += rows.abs().sum(0)
        self.n_tokens += len(rows)

    def mean(self) -> Float[Tensor, "size size"]:
        """H, exactly symmetric.

        Raises:
            NotFiniteError: an activation was NaN or infinite, or overflowed when squared.
            ValueError: no row was ever added.
        """
        if self.n_tokens == 0:
            raise ValueError("no token was seen: the covariance of nothing is undefined")
        bad = ~torch.isfinite(self.total)
        if bad.any():
            channels = int(bad.any(0).sum())
            raise NotFiniteError(
                f"{channels} of {len(self.total)} channels hold NaN or infinity; does the model overflow in this dtype?"
            )
        return (self.total + self.total.T) / (2 * self.n_tokens)

    def mean_magnitude(self) -> Float[Tensor, " size"]:
        """E|x_i|, float64: the activation magnitude by which ASVD scales channels."""
        return self.magnitude / self.n_tokens


@contextmanager
def _products_in_bfloat16() -> Iterator[None]:
    """Float32 matrix products may round operands to bfloat16 inside: twice as fast, exact for such operands."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
