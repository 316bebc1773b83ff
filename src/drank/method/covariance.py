"""Covariances of inputs, H = E[x xᵀ], and of output gradients, G = E[g gᵀ], streamed. Knows tensors only.

Precision: activations are bfloat16, float16 or float32; products and sums are float32. Products of bfloat16 numbers are
exact in float32, so where a processor has bfloat16 units the multiplication itself runs in them. The sum has a
*componentwise* bound, |ΔH_ij| <= (n + b) ε Σ|x_i||x_j| / N with n the tokens per batch, b the batches, N = n b and
ε = 6e-8: a channel of huge activations cannot drown the others. The bound is loose. Measured against float64 on the
default model, the largest error is 4e-6 of √(H_ii H_jj) (docs/log.md).

A covariance is symmetric: only panels of rows from the diagonal on are multiplied, half of the work where it is wide.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


class NotFiniteError(ValueError):
    """A NaN or an infinity where numbers were expected; the message says where and how many."""


def finite(matrix: Tensor, what: str) -> Tensor:
    """The matrix itself; ``what`` names it in the error.

    Raises:
        NotFiniteError: an entry is NaN or infinite.
    """
    if not torch.isfinite(matrix.sum()) and (bad := int((~torch.isfinite(matrix)).sum())):  # a sum may also overflow
        raise NotFiniteError(f"{bad} of {matrix.numel()} entries of the {what} are NaN or infinite")
    return matrix


def clipped(
    gradients: Float[Tensor, "windows tokens size"], low: float, high: float, margin: float = 0.0
) -> Float[Tensor, "rows size"]:
    r"""Gradients of the middle tokens of every window, none of them far from the window's mean norm.

    .. math:: g_t \leftarrow \frac{\min(\max(|g_t|, \mathrm{low} \, μ), \mathrm{high} \, μ)}{|g_t|} \, g_t

    with μ the mean norm of the middle tokens of the window whose gradient is not zero; the others stay zero. KFAC-SVD
    (LEMS, ICML 2026) has .1, 10 and a margin of an eighth.

    Args:
        low, high: bounds of the norm in units of μ, below and above 1.
        margin: share of the tokens left out at either end, rounded down; below a half.
    """
    n_tokens = gradients.shape[1]
    cut = int(margin * n_tokens)
    middle = gradients[:, cut : n_tokens - cut].float()
    norms = torch.linalg.vector_norm(middle, dim=-1, keepdim=True)
    mean = norms.sum(1, keepdim=True) / (norms > 0).sum(1, keepdim=True).clamp_min(1)
    wanted = norms.clamp(low * mean, high * mean)
    return torch.where(norms > 0, wanted / norms, 0.0).mul(middle).flatten(0, 1)


PANEL = 128  # rows; narrower ones save little more, and their products are too small to run fast


class SecondMoment:
    r"""Running second moment of rows.

    .. math:: H = \frac{1}{n} \sum_{t=1}^{n} x_t x_t^\top

    x_t has shape (d,). H (d, d) is symmetric and, up to rounding, positive semidefinite and independent of the
    batching.

    Args:
        size: d.
        device: of the sums.
        bfloat16_units: True multiplies rows in bfloat16 by bfloat16 units, which gives the same products. Without
            units, or with slow ones, a float32 product of the converted rows is faster.

    Attributes:
        total: (d, d) float32, Σ x xᵀ on and above the diagonal, undefined below it.
        magnitude: (d,) float64, Σ |x|; None without ``magnitudes``.
        n_tokens: n.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str | None = None,
        *,
        bfloat16_units: bool = False,
        magnitudes: bool = True,
    ) -> None:
        self.total = torch.zeros(size, size, device=device)
        self.magnitude = torch.zeros(size, dtype=torch.float64, device=device) if magnitudes else None
        self.n_tokens = 0
        self._bfloat16_units = bfloat16_units

    def add(self, x: Float[Tensor, "tokens size"]) -> None:
        """Take in a batch of rows."""
        rows = x.float()
        in_units = self._bfloat16_units and x.dtype == torch.bfloat16
        with _products_in_bfloat16() if in_units else nullcontext():
            for i in range(0, len(self.total), PANEL):
                self.total[i : i + PANEL, i:].addmm_(rows[:, i : i + PANEL].T, rows[:, i:])
        if self.magnitude is not None:
            self.magnitude += torch.linalg.vector_norm(rows, 1, 0)
        self.n_tokens += len(rows)

    def mean(self) -> Float[Tensor, "size size"]:
        """H, float32, exactly symmetric.

        Raises:
            NotFiniteError: an activation was NaN or infinite, or overflowed when squared.
            ValueError: no row was ever added.
        """
        if self.n_tokens == 0:
            raise ValueError("no token was seen: the covariance of nothing is undefined")
        H = self.total / self.n_tokens
        for i in range(0, len(H), PANEL):  # no second matrix of this size: in wide models it is the largest of all
            block = H[i : i + PANEL, i : i + PANEL]
            block.triu_().add_(block.triu(1).T)
            H[i : i + PANEL, :i] = H[:i, i : i + PANEL].T
        if not torch.isfinite(H.sum()) and (bad := int((~torch.isfinite(H)).any(0).sum())):  # a sum may also overflow
            raise NotFiniteError(
                f"{bad} of {len(H)} channels hold NaN or infinity; does the model overflow in this dtype?"
            )
        return H

    def mean_magnitude(self) -> Float[Tensor, " size"] | None:
        """E|x_i|, float64, the activation magnitude by which ASVD scales channels; None without ``magnitudes``."""
        return None if self.magnitude is None else self.magnitude / self.n_tokens


@contextmanager
def _products_in_bfloat16() -> Iterator[None]:
    """Float32 matrix products may round operands to bfloat16: twice as fast, and exact for operands of that type."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
