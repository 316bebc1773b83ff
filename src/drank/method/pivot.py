r"""Pivot form of a low-rank matrix: some of its own rows, and the others as combinations of them. Knows tensors only.

A matrix of rank k has k rows that span the rest, W[rest] = C W[kept], so k (out + in - k) numbers say what two
factors say with k (out + in). C is the solution of a linear system: everything is computed in float64, and the caller
rounds once, to the dtype of the model.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from drank.method.covariance import finite


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


class GroupMember(NamedTuple):
    """Matrix i of a stack in pivot form: W_i[order] = [K[first : first + r_i]; coefficients @ K], K the form's kept.

    Attributes:
        first: where in K the r_i rows that are the member's own begin.
        coefficients: (out_i - r_i, k) float64, its other rows in terms of K, in their order in W_i.
        order: (out_i,) int32, the row of W_i that row j of [K[first : first + r_i]; coefficients @ K] is.
    """

    first: int
    coefficients: Float[Tensor, "rest k"]
    order: Int32[Tensor, " out"]


def pivot_rows(left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]) -> PivotForm:
    r"""Pivot form of W = left @ right.

    Rows are chosen by LU with partial pivoting of `left`, whose columns are in the order of the singular values: step i
    takes the row that the first i - 1 columns, interpolated at the rows taken, miss most. This is the discrete
    empirical interpolation method; the rows of a smaller rank are the first of those of a larger one. With
    P left = [L_1; L_2] U,

    .. math:: W_{kept} = left_{kept} R, \qquad C = left_{rest} left_{kept}^{-1} = L_2 L_1^{-1}

    by a triangular solve. Entries of L_2 are at most 1; those of C are bounded by 2^k only in theory, in practice they
    are below 10. Pivoted QR of leftᵀ gives half of that, at several times the cost (docs/log.md).

    Raises:
        NotFiniteError: a factor holds NaN or infinity.
        RankDeficientError: the columns of `left` are linearly dependent up to rounding, as always where k > out.
    """
    L, R = finite(left, "left factor").double(), finite(right, "right factor").double()
    n_out, k = L.shape
    factors, swaps, _ = torch.linalg.lu_factor_ex(L)
    # A pivot counts if it is more than the rounding error of its column.
    least = max(n_out, k) * torch.finfo(torch.float64).eps * L.abs().amax(0)
    pivots = factors.diagonal().abs()
    rank = int((pivots > least[: len(pivots)]).sum())
    if rank < k:
        raise RankDeficientError(
            f"the left factor ({n_out}, {k}) has only {rank} independent columns: keep rank {rank} or fewer"
        )
    order = _permutation(swaps, n_out)
    coefficients = torch.linalg.solve_triangular(factors[:k], factors[k:], upper=False, left=False, unitriangular=True)
    kept, by_kept = order[:k].sort()
    rest, by_rest = order[k:].sort()
    coefficients = coefficients[by_rest][:, by_kept]
    return PivotForm(
        kept=L[kept] @ R,
        coefficients=coefficients,
        order=torch.cat([kept, rest]).int(),
        max_abs_coefficient=float(coefficients.abs().max()) if len(rest) else 0.0,
    )


def split_group(form: PivotForm, out_sizes: Sequence[int]) -> list[GroupMember]:
    r"""Members of the stack W = [W_1; ...; W_n] whose pivot form is given.

    The k rows K that span the stack lie anywhere in it. `form.kept` has them in the order of the stack, so the r_i
    of member i are neighbours; r_i may be 0 or all of its rows. In total the stack takes

    .. math:: k\,\Big(\sum_i out_i + in - k\Big)

    parameters. Coefficients are views of the form's.

    Args:
        out_sizes: out_1 ... out_n, rows of the members in the order in which they were stacked.

    Raises:
        ValueError: the sizes are not positive, or do not add up to the rows of the stack.
    """
    if sum(out_sizes) != len(form.order) or min(out_sizes) < 1:
        raise ValueError(
            f"out_sizes {list(out_sizes)} must be positive and add up to the {len(form.order)} rows of the stack: give "
            "the output sizes of the matrices that were stacked, in their order"
        )
    kept, rest = form.order.split([len(form.kept), len(form.coefficients)])
    starts = torch.tensor([0, *accumulate(out_sizes)], dtype=kept.dtype, device=kept.device)
    kept_before, rest_before = torch.searchsorted(kept, starts).tolist(), torch.searchsorted(rest, starts).tolist()
    return [
        GroupMember(first, form.coefficients[a:b], torch.cat([kept[first:last], rest[a:b]]) - start)
        for (first, last), (a, b), start in zip(pairwise(kept_before), pairwise(rest_before), starts, strict=False)
    ]


def _permutation(swaps: Tensor, n_rows: int) -> Tensor:
    """Rows in the order that LAPACK's successive exchanges, counted from 1, leave them in."""
    order = list(range(n_rows))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order, device=swaps.device)
