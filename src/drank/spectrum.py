r"""Whitened spectra and the factors that slicing needs. Knows tensors only: no files, no models.

With y = W x, H = E[x xᵀ] and G = E[g gᵀ], the loss of replacing W by W - D is \|G^½ D H^½\|_F^2 (half of it in nats a
token, where g is the gradient of the summed token loss). Hence
Z = G^½ W H^½ = U S Vᵀ, and keeping k components costs Σ_{i>k} s_i² (Eckart-Young). See docs/method.md.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from drank.covariance import NotFiniteError

# Eigenvalues of Z Zᵀ below this share of the largest one are rounding noise of a float64 eigendecomposition.
NOISE = 1e-13


@dataclass(frozen=True)
class Spectrum:
    """Singular values of Z and rank-one components of W in the same order.

    W_k = output_vectors[:k].T @ input_vectors[:k] is the best rank-k approximation in the metric.

    Attributes:
        singular_values: (r,) float64, descending, r <= min(out, in); the unit is that of the metric.
        output_vectors: (r, out) float32.
        input_vectors: (r, in) float32; rows i of both have the same norm.
        n_discarded: directions of Z dropped as numerically zero; min(out, in) - r.
    """

    singular_values: Float[Tensor, " r"]
    output_vectors: Float[Tensor, "r out"]
    input_vectors: Float[Tensor, "r in"]
    n_discarded: int


def square_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Symmetric square root of a positive semidefinite matrix (float64); negative rounding is read as zero."""
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T


class Metric:
    """A covariance (d, d) in float64, and its square root where one is asked for: computed once for all weights that
    are measured in it.

    Raises:
        NotFiniteError: the covariance holds NaN or infinity.
    """

    def __init__(self, covariance: Float[Tensor, "d d"], what: str = "metric") -> None:
        self.covariance = _finite(covariance, what).double()

    @cached_property
    def root(self) -> Float[Tensor, "d d"]:
        return square_root(self.covariance)


def damped(covariance: Float[Tensor, "d d"], share: float) -> Float[Tensor, "d d"]:
    """The covariance plus ``share`` of its mean diagonal on the diagonal: no direction is entirely free."""
    ridge = torch.full_like(covariance.diagonal(), share) * covariance.diagonal().mean()
    return covariance + torch.diag(ridge)


def whitened_spectrum(
    weight: Float[Tensor, "out in"],
    input_metric: Metric | Float[Tensor, "in in"] | None = None,
    output_metric: Metric | Float[Tensor, "out out"] | None = None,
) -> Spectrum:
    r"""Spectrum of Z = G^½ W H^½ and the components of W, without inverse or Cholesky, so any H and G will do.

    With Z Zᵀ = U S² Uᵀ (out, out) and c_i = G^½ u_i, component i of W is (W H Wᵀ c_i) (c_iᵀ W) / s_i². With
    Zᵀ Z = V S² Vᵀ (in, in) and a_i = H^½ v_i, it is (W a_i) (a_iᵀ Wᵀ G W) / s_i². The smaller of the two eigenproblems
    is solved, in float64: squaring Z loses singular values below 1e-8 of the largest, which cost less than 1e-16 of the
    total. H or G = None is the identity (both: plain SVD); a :class:`Metric` keeps its root for the next weight.

    Raises:
        NotFiniteError: W, H or G holds NaN or infinity.
    """
    W = _finite(weight, "weight").double()
    H, G = _metric(input_metric, "input metric"), _metric(output_metric, "output metric")
    if len(W) <= W.shape[1]:
        energies, right, left = _components(W.T, G, H)
    else:
        energies, left, right = _components(W, H, G)
    kept = max(1, int((energies > NOISE * energies[0]).sum()))  # a zero matrix keeps one zero component
    left, right = left[:kept], right[:kept]
    tiny = torch.finfo(torch.float64).tiny
    scale = ((right.norm(dim=1) + tiny) / (left.norm(dim=1) + tiny)).sqrt()[:, None]
    return Spectrum(
        singular_values=energies[:kept].sqrt(),
        output_vectors=(left * scale).float().contiguous(),
        input_vectors=(right / scale).float().contiguous(),
        n_discarded=min(W.shape) - kept,
    )


def _components(W: Tensor, near: Metric | None, far: Metric | None) -> tuple[Tensor, Tensor, Tensor]:
    """Energies, and the vectors of both sides as rows, from the eigenproblem on the side of W's columns.

    near is the metric of the columns' side, far that of the rows'.
    """
    gram = W.T @ (W if far is None else far.covariance @ W)
    root = None if near is None else near.root
    energies, V = _descending_eigh(gram if root is None else root @ gram @ root)
    a = V if root is None else root @ V
    return energies, (W @ a).T, (gram @ a / energies.clamp_min(torch.finfo(torch.float64).tiny)).T


def effective_rank(singular_values: Float[Tensor, " k"]) -> float:
    r"""Number of directions a spectrum really uses: the exponential of its entropy.

    .. math:: R = \exp\Bigl(-\sum_i p_i \log p_i\Bigr), \qquad p_i = \sigma_i^2 / \sum_j \sigma_j^2

    1 for a rank-one matrix, k for a flat spectrum, unchanged by rescaling. Zero singular values add nothing; the
    spectrum of a zero matrix has none and R = 1 by convention (a rank below one cannot be stored).

    Reference: D-Rank (arXiv:2509.25622), Eq. 1-2; λ_i = σ_i², as in the paper.
    """
    energies = singular_values.double() ** 2
    if energies.sum() == 0:
        return 1.0
    p = energies / energies.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def _descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)


def _metric(given: Metric | Tensor | None, what: str) -> Metric | None:
    return Metric(given, what) if isinstance(given, Tensor) else given


def _finite(matrix: Tensor, what: str) -> Tensor:
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise NotFiniteError(f"{bad} of {matrix.numel()} entries of the {what} are NaN or infinite")
    return matrix
