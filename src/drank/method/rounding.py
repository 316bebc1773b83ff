r"""Rounding of a weight to few bits, with the loss that the metric gives it. Knows tensors only.

A grid has ``bits``, a group size along the inputs, and for every row and group a scale s and a zero point z, so that a
number is s (q - z) with q an integer in [0, 2^bits). Rounding W (out, in) to Ŵ costs, with E = Ŵ - W, H = E[x xᵀ] and
G = E[g gᵀ],

.. math:: \tfrac12 \operatorname{tr}(G E H E^\top)

nats per token in the same metric as truncation (docs/method.md). ``nearest`` takes the closest grid point; ``feedback``
moves what is not rounded yet so that it makes up for what is. Of a low-rank matrix C K, K is rounded first, ``refit``
makes C up for it, and C is rounded in the metric K H Kᵀ of what it multiplies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from drank.method.covariance import finite
from drank.method.metrics import damped
from drank.method.precisions import Grid

# Shares of a group's range that a grid may span, the whole of it first.
CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52)
DAMPING = 3e-2  # share of the mean diagonal added to H where it is factored (GPTQ: .01); .001 to .1 differ by 1 to 4 %
# The same for G, of which few windows know little: with .01 the loss falls on calibration text and rises on others.
GRADIENT_DAMPING = 3.0
NEGLIGIBLE = 1e-7  # share of the mean diagonal added to K H Kᵀ, where rows of K may depend on each other
ROWS = 64  # rows that take the feedback of the rows before them together, and none of each other's
AT_ONCE = 2**16  # numbers whose grids are chosen together, few enough for a processor's cache
COLUMNS = 32  # columns of a block; 16 and 64 take up to a quarter longer
CUT_OFF = {2: 1.34}  # loss over that of uniform errors, where numbers that feedback has moved often fall off the grid


@dataclass(frozen=True)
class Rounded:
    """A weight on a grid.

    Attributes:
        codes: (out, in) uint8, q.
        scales: (out, groups) bfloat16, s.
        zeros: (out, groups) uint8, z.
        group: inputs per group.
    """

    codes: UInt8[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    zeros: UInt8[Tensor, "out groups"]
    group: int

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """s (q - z), float32."""
        s, z = _spread(self.scales, self.zeros, self.group, self.codes.shape[1])
        return s * (self.codes.float() - z)


def loss(
    error: Float[Tensor, "out in"], H: Float[Tensor, "in in"] | None, G: Float[Tensor, "out out"] | None = None
) -> float:
    """½ tr(G E H Eᵀ) in float64; None is the identity."""
    E = error.double()
    right = E if H is None else E @ H.double()
    left = E if G is None else G.double() @ E
    return 0.5 * float((left * right).sum())


def nearest(weight: Float[Tensor, "out in"], grid: Grid, importance: Float[Tensor, " in"] | None = None) -> Rounded:
    """Each number to the closest point of its group's grid.

    Args:
        importance: of inputs, such as the diagonal of H, by which the range of a grid is chosen; all alike where None.
    """
    scales, zeros = grid_of(weight, grid, importance)
    s, z = _spread(scales, zeros, grid.group, weight.shape[1])
    codes = (weight.float() / s + z).round().clamp(0, grid.levels - 1)
    return Rounded(codes.to(torch.uint8), scales, zeros, grid.group)


def grid_of(
    weight: Float[Tensor, "out in"], grid: Grid, importance: Float[Tensor, " in"] | None = None
) -> tuple[Float[Tensor, "out groups"], UInt8[Tensor, "out groups"]]:
    """Scales (bfloat16) and zero points (uint8) with the least weighted square error among ranges cut by CLIPS.

    Raises:
        NotFiniteError: the weight holds NaN or infinity.
    """
    W = finite(weight, "weight")
    n_in, spare = W.shape[1], -W.shape[1] % grid.group
    each = torch.ones(n_in) if importance is None else importance.float()
    each = F.pad(each, (0, spare)).unflatten(0, (-1, grid.group))
    found = [
        _least_error(F.pad(rows.float(), (0, spare)).unflatten(1, (-1, grid.group)), grid, each)
        for rows in W.split(max(1, AT_ONCE // n_in))
    ]
    scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scales.bfloat16(), zeros.to(torch.uint8)


def _least_error(groups: Tensor, grid: Grid, each: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of every group (rows, groups, numbers)."""
    top, low, last = groups.amax(-1).clamp_min(0), groups.amin(-1).clamp_max(0), grid.levels - 1
    best, scales, zeros = (torch.full_like(top, value) for value in (torch.inf, 1.0, 0.0))
    for clip in CLIPS:
        if grid.symmetric:
            s = clip * torch.maximum(top, -low) * 2 / last
            z = torch.full_like(s, grid.levels // 2)
        else:
            s = clip * (top - low) / last
            z = (-clip * low / s.clamp_min(1e-30)).round().clamp(0, last)
        s = torch.where(s > 0, s, torch.ones_like(s)).bfloat16().float()
        error = groups.div(s[..., None]).add_(z[..., None]).round_().clamp_(0, last)
        error = error.sub_(z[..., None]).mul_(s[..., None]).sub_(groups).square_().mul_(each).sum(-1)
        better = error < best
        best, scales, zeros = (torch.where(better, new, old) for new, old in ((error, best), (s, scales), (z, zeros)))
    return scales, zeros


def feedback(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    H: Float[Tensor, "in in"],
    G: Float[Tensor, "out out"] | None = None,
) -> Rounded:
    r"""Rounding with error feedback in the metric of the inputs, or of inputs and output gradients.

    With H = U D Uᵀ, U unit upper triangular, tr(E H Eᵀ) = Σ_j d_j \|(E U)_j\|² and (E U)_j = E_j + Σ_{i<j} E_i U_ij. So
    column j is rounded from W_j - Σ_{i<j} E_i U_ij: only its own rounding error is left in its term. That is GPTQ
    (arXiv:2210.17323) in the form of LDLQ (arXiv:2307.13304). Columns go in the order of their second moments, largest
    first, so that most can still make up for the dearest errors; groups of a grid stay neighbours. With G = V C Vᵀ in
    the same way, the term of entry (a, b) is V₁..ₐ,ₐᵀ E U₁..ᵦ,ᵦ, and rows take feedback of the rows before them, too
    (YAQA, arXiv:2505.22988): here in steps of ROWS rows, which take none of each other's. Blocks that need nothing of
    each other are rounded at once.

    Raises:
        NotFiniteError: the weight, H or G holds NaN or infinity.
    """
    order = _order(H)
    U, _ = unit_upper(H[order][:, order], DAMPING)
    V = None if G is None else unit_upper(G, GRADIENT_DAMPING, torch.float32)[0]
    scales, zeros = grid_of(weight, grid, H.diagonal())
    order = order.flip(0)  # the first column stands last
    s, z = (each[:, order] for each in _spread(scales, zeros, grid.group, weight.shape[1]))
    codes = _wavefront(weight.float()[:, order], s, z, U.flip(0, 1), V, grid.levels)
    return Rounded(codes[:, order.argsort()].to(torch.uint8), scales, zeros, grid.group)


def refit(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "k in"],
    H: Float[Tensor, "in in"],
    G: Float[Tensor, "out out"] | None = None,
    fixed: Float[Tensor, "n in"] | None = None,
) -> Float[Tensor, "rest k"]:
    r"""The best C for [F; C K] in the place of W = [W_1; W_2], float64, with F = ``fixed`` the first n rows.

    tr(G D H Dᵀ) with D = W - [F; C K] is least where its derivative by C, -2 (G D H Kᵀ)_2, is zero:

    .. math:: C = \bigl(W_2 + G_{22}^{-1} G_{21} (W_1 - F)\bigr) H K^\top (K H K^\top)^{-1}

    so later rows also make up for what the fixed ones lost, as far as G (damped like that of :func:`feedback`) knows
    them to act alike. G = None is the identity: they do not.

    Raises:
        NotFiniteError: the weight, the basis, H or G holds NaN or infinity.
    """
    W, K = finite(weight, "weight").double(), finite(basis, "basis").double()
    H, n = finite(H, "covariance").double(), 0 if fixed is None else len(fixed)
    wanted = W[n:]
    if G is not None and fixed is not None:
        M = damped(finite(G, "covariance"), GRADIENT_DAMPING)
        M.diagonal().add_(torch.finfo(torch.float64).tiny)
        lost = W[:n] - fixed.double()
        wanted = wanted + torch.cholesky_solve(M[n:, :n] @ lost, torch.linalg.cholesky(M[n:, n:]))
    KH = K @ H
    gram = damped(KH @ K.T, NEGLIGIBLE)
    gram.diagonal().add_(torch.finfo(torch.float64).tiny)  # a basis of zeros
    return torch.cholesky_solve((wanted @ KH.T).T, torch.linalg.cholesky(gram)).T


def expected_loss(
    weight: Float[Tensor, "out in"], grid: Grid, H: Float[Tensor, "in in"], G: Float[Tensor, "out out"]
) -> float:
    r"""Loss of :func:`feedback` along the columns, before anything is rounded.

    .. math:: \tfrac12 \sum_a G_{aa} \sum_b d_b\, s_{ab}^2 / 12

    with d of H = U D Uᵀ and s the scales: rounding errors are taken as independent and uniform within a step, and at 2
    bits a third is added. On the default model it was within 9 % of what rounding to 2, 3 and 4 bits then cost
    (docs/log.md).
    """
    (rows,) = expected_by_row(weight, [grid], H)
    return float(G.diagonal().double() @ rows)


def expected_by_row(
    weight: Float[Tensor, "out in"], grids: Sequence[Grid], H: Float[Tensor, "in in"]
) -> list[Float[Tensor, " out"]]:
    r"""½ Σ_b d_b s_ab² / 12 of every row a and each grid, float64: what :func:`expected_loss` weighs by G_aa."""
    order, found = _order(H), []
    d = unit_upper(H[order][:, order], DAMPING)[1][order.argsort()]
    for grid in grids:
        scales, _ = grid_of(weight, grid, H.diagonal())
        steps = scales.double().square().repeat_interleave(grid.group, 1)[:, : weight.shape[1]]
        found.append(0.5 / 12 * CUT_OFF.get(grid.bits, 1.0) * (steps @ d))
    return found


def _order(H: Float[Tensor, "in in"]) -> Int64[Tensor, " in"]:
    """Columns by their second moment, the largest first."""
    return H.diagonal().argsort(descending=True, stable=True)


def unit_upper(
    covariance: Float[Tensor, "d d"], damping: float, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """U (float32, unit upper triangular) and the diagonal of D (``dtype``) with covariance = U D Uᵀ, after ``damping``.

    Args:
        dtype: of the factorisation; float32 takes a third of the time, and is for a strong damping.

    Raises:
        NotFiniteError: the covariance holds NaN or infinity.
    """
    M = damped(finite(covariance, "covariance"), damping).to(dtype)
    M.diagonal().add_(torch.finfo(dtype).tiny)  # inputs that are all zero
    upper = torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1)  # upper @ upper.T = M
    return (upper / upper.diagonal()).float(), upper.diagonal().square()


def _wavefront(W: Tensor, s: Tensor, z: Tensor, L: Tensor, V: Tensor | None, levels: int) -> Tensor:
    """Codes (out, in) with feedback from the last column to the first, by L unit lower triangular, and down the rows.

    Blocks of ROWS x COLUMNS on a diagonal need nothing of each other, only what lies above or to the right of them. So
    a diagonal is rounded at once, the one in the upper right corner first. With the errors E and M = E L, numbers are
    rounded from W - E L - VᵀM, in which a block's own errors count in E L alone, column by column.
    """
    n_out, n_in = W.shape
    rows, cols = n_out if V is None else min(ROWS, n_out), min(COLUMNS, n_in)
    down, across = -n_out % rows, -n_in % cols  # padding, which is rounded to itself
    W, s, z = (_blocks(F.pad(x, (0, across, 0, down), value=v), rows, cols) for x, v in ((W, 0.0), (s, 1.0), (z, 0.0)))
    n_down, n_across = W.shape[:2]
    L = F.pad(L, (0, across, 0, across)).view(-1, n_across, cols).transpose(0, 1).contiguous()
    own = L.unflatten(1, (n_across, cols)).diagonal(0, 0, 1).permute(2, 0, 1).contiguous()
    E, codes = torch.zeros(n_down, rows, n_across, cols), torch.empty_like(W)
    M = torch.zeros(n_across, n_down, rows, cols)
    V = None if V is None else F.pad(V, (0, down, 0, down)).view(-1, n_down, rows).permute(1, 2, 0).contiguous()
    for offset in range(n_across - 1, -n_down, -1):
        top, left = max(0, -offset), max(0, offset)
        n = min(n_down - top, n_across - left)
        here, there = slice(top, top + n), slice(left, left + n)
        right, above = (left + 1) * cols, (top + n - 1) * rows
        moved = E[here].flatten(2)[..., right:] @ L[there, right:]
        gone = moved if V is None else moved + V[here, :, :above] @ M[there].flatten(1, 2)[:, :above]
        weight, scale, zero = (x.diagonal(offset).permute(1, 2, 0).contiguous() for x in (W, s, z))
        q, e = _columns(weight, weight - gone.permute(2, 0, 1), scale, zero, own[there], levels)
        codes.diagonal(offset).copy_(q.permute(2, 0, 1))
        E.transpose(1, 2).diagonal(offset).copy_(e.permute(2, 0, 1))
        if V is not None:
            M.transpose(0, 1).diagonal(offset).copy_((moved + e.permute(1, 2, 0) @ own[there]).permute(1, 2, 0))
    return codes.transpose(1, 2).flatten(2).flatten(0, 1)[:n_out, :n_in]


def _columns(W: Tensor, wanted: Tensor, s: Tensor, z: Tensor, L: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes and errors (columns, blocks, rows) of blocks, the last column first; L is (blocks, columns, columns).

    Few operations on tensors per column, since each takes longer to begin than to do.
    """
    codes, E, known = torch.empty_like(W), torch.empty_like(W), torch.addcmul(W, s, z).neg_()
    feedback_of, wanted = L.permute(1, 2, 0)[..., None].contiguous(), wanted.contiguous()
    for j, (q, e, w, scale) in reversed(list(enumerate(zip(codes, E, wanted, s, strict=True)))):
        torch.div(w, scale, out=q).add_(z[j]).round_().clamp_(0, levels - 1)
        torch.addcmul(known[j], scale, q, out=e)
        wanted[:j].addcmul_(feedback_of[j, :j], e, value=-1)
    return codes, E


def _blocks(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """(blocks down, blocks across, rows, columns)."""
    return matrix.view(matrix.shape[0] // rows, rows, -1, cols).transpose(1, 2)


def _spread(scales: Tensor, zeros: Tensor, group: int, n_in: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every number, float32."""
    s, z = (t.float().repeat_interleave(group, 1)[:, :n_in] for t in (scales, zeros))
    return s, z
