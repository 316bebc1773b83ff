r"""Pivot form of a low-rank matrix: some of its own rows, and the others as combinations of them. Knows tensors
only.

A matrix of rank k has k rows that span the rest, W[rest] = C W[kept], so k (out + in - k) numbers say what two
factors say with k (out + in). Everything is computed in float64: C is the solution of a linear system, and the
caller rounds once, to the dtype of the model.
"""

from typing import NamedTuple

import scipy.linalg
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from drank.covariance import NotFiniteError


class RankDeficientError(ValueError):
    """The left factor has fewer independent columns than it has columns; the message says how many."""


class PivotForm(NamedTuple):
    """W[order] = [kept; coefficients @ kept].

    Attributes:
        kept: (k, in) float64, k rows of W, in their order in W.
        coefficients: (out - k, k) float64, the other rows in terms of `kept`, in their order in W.
        order: (out,) int32, the row of W that row i of [kept; coefficients @ kept] is.
        max_abs_coefficient: largest absolute coefficient, 0 where there is none. Rounding errors of `kept`
            reach the other rows multiplied by coefficients: about 1 is harmless, hundreds are not.
    """

    kept: Float[Tensor, "k in"]
    coefficients: Float[Tensor, "rest k"]
    order: Int32[Tensor, " out"]
    max_abs_coefficient: float


def pivot_rows(left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> PivotForm:
    r"""Pivot form of W = left @ right.

    Rows are chosen by QR with column pivoting of leftᵀ (Businger-Golub): each step takes the row farthest from
    the span of those taken. Then, with L = left,

    .. math:: W_{kept} = L_{kept} R, \qquad C = L_{rest} L_{kept}^{-1}

    by solving, never by inverting. Pivoting bounds the coefficients by 2^k only in theory; in practice they
    stay near 1.

    Raises:
        NotFiniteError: a factor holds NaN or infinity.
        RankDeficientError: the columns of `left` are linearly dependent up to rounding (always so where k >
        out).
    """
    L, R = _finite(left, "left").double(), _finite(right, "right").double()
    n_out, k = L.shape
    triangle, pivots = scipy.linalg.qr(L.T.numpy(force=True), mode="r", pivoting=True)
    rank = _numerical_rank(torch.from_numpy(triangle).diagonal(), max(n_out, k))
    if rank < k:
        raise RankDeficientError(
            f"the left factor ({n_out}, {k}) has only {rank} independent columns: keep rank {rank} or fewer"
        )
    taken = torch.from_numpy(pivots).to(L.device, torch.int64)
    kept, rest = taken[:k].sort().values, taken[k:].sort().values
    coefficients = torch.linalg.solve(L[kept], L[rest], left=False)
    return PivotForm(
        kept=L[kept] @ R,
        coefficients=coefficients,
        order=torch.cat([kept, rest]).int(),
        max_abs_coefficient=float(coefficients.abs().max()) if len(rest) else 0.0,
    )


def _numerical_rank(diagonal: Tensor, size: int) -> int:
    magnitudes = diagonal.abs()
    return int((magnitudes > size * torch.finfo(torch.float64).eps * magnitudes[0]).sum())


def _finite(matrix: Tensor, side: str) -> Tensor:
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NotFiniteError(f"{bad} of {matrix.numel()} entries of the {side} factor are NaN or infinite")
    return matrix
