r"""Whitened spectra and the vectors that slicing needs. Knows tensors only: no files, no models.

With y = W x, H = E[x xᵀ] and G = E[g gᵀ], replacing W by W - D costs \|G^½ D H^½\|_F^2 (half of it in nats per token,
where g is the gradient of the summed token loss). Hence Z = G^½ W H^½ = U S Vᵀ, and keeping k components costs
Σ_{i>k} s_i² (Eckart-Young). See docs/method.md.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from drank.method.covariance import finite

# Eigenvalues of Z Zᵀ below this share of the largest one are rounding noise of a float64 eigendecomposition.
NOISE = 1e-13
# Pivots of a Cholesky factor below this share of the largest one may be rounding noise of a covariance in float32.
NEARLY_SINGULAR = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """Singular values of Z, and vectors on the smaller side of W that turn W into its best rank-k approximation.

    W_k = duals[:k].T @ vectors[:k] @ W where out <= in, and W @ vectors[:k].T @ duals[:k] elsewhere: a projection on k
    dimensions, oblique unless the metric of that side is the identity. One product with W gives the factor of the
    larger side (:func:`factors`), so nobody stores it.

    Attributes:
        singular_values: (r,) float64, descending, r <= min(out, in); the unit is that of the metric.
        vectors: (r, d) float32 with d = min(out, in); G^½ u_i where out <= in, elsewhere H^½ v_i, with any root.
        duals: (r, d) float32, G^-½ u_i or H^-½ v_i on their range, so vectors @ duals.T is the identity. None where
            they are the vectors, since the metric of that side is the identity.
        n_discarded: directions of Z dropped as numerically zero; min(out, in) - r.
    """

    singular_values: Float[Tensor, " r"]
    vectors: Float[Tensor, "r d"]
    duals: Float[Tensor, "r d"] | None
    n_discarded: int

    def rows(self, k: int | None = None) -> dict[str, Tensor]:
        """The first k rows of ``vectors``, and of ``duals`` where they differ, by name; all rows, if k is None."""
        return {"vectors": self.vectors[:k]} | ({} if self.duals is None else {"duals": self.duals[:k]})


def factors(
    weight: Float[Tensor, "out in"], vectors: Float[Tensor, "k d"], duals: Float[Tensor, "k d"] | None = None
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """The best rank-k approximation of a weight as left @ right, from the first k rows of a spectrum's vectors.

    Column i of left and row i of right have the same norm, so that neither loses more than the other when both are
    rounded to the dtype of a model.

    Args:
        weight: the W that the spectrum is of.
        duals: None as in :class:`Spectrum`.
    """
    W, near, dual = weight.float(), vectors.float(), (vectors if duals is None else duals).float()
    left, right = (dual.T, near @ W) if len(W) <= W.shape[1] else (W @ near.T, dual)
    tiny = torch.finfo(torch.float32).tiny
    scale = ((right.norm(dim=1) + tiny) / (left.norm(dim=0) + tiny)).sqrt()
    return left * scale, right / scale[:, None]


def square_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Symmetric square root of a positive semidefinite matrix (float64); negative eigenvalues, rounding, read as 0."""
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T


def root_of(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Some R with R Rᵀ = covariance (float64): its Cholesky factor or, if nearly singular, its symmetric root.

    Any such R gives the same singular values and projections, and a Cholesky factor takes a twentieth of the time.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    pivots = factor.diagonal()
    return square_root(covariance) if failed or pivots.min() < NEARLY_SINGULAR * pivots.max() else factor


class Metric:
    """A covariance (d, d) in float64 and its root R, R Rᵀ = covariance, computed once for all weights measured in it.

    Raises:
        NotFiniteError: the covariance holds NaN or infinity.
    """

    def __init__(self, covariance: Float[Tensor, "d d"], what: str = "metric") -> None:
        self.covariance = finite(covariance, what).double()

    @cached_property
    def root(self) -> Float[Tensor, "d d"]:
        return root_of(self.covariance)


def whitened_spectrum(
    weight: Float[Tensor, "out in"],
    input_metric: Metric | Float[Tensor, "in in"] | None = None,
    output_metric: Metric | Float[Tensor, "out out"] | None = None,
) -> Spectrum:
    r"""Spectrum of Z = G^½ W H^½ and vectors of W's smaller side, without an inverse, so any H and G will do.

    With Z Zᵀ = U S² Uᵀ (out, out) and c_i = G^½ u_i, component i of W is (W H Wᵀ c_i / s_i²) (c_iᵀ W). With
    Zᵀ Z = V S² Vᵀ (in, in) and a_i = H^½ v_i, it is (W a_i) (a_iᵀ Wᵀ G W / s_i²). The smaller of the two eigenproblems
    is solved, in float64: squaring Z loses singular values below 1e-8 of the largest, which cost less than 1e-16 of the
    total. H or G = None is the identity (both: plain SVD); a :class:`Metric` keeps its root for the next weight.

    Raises:
        NotFiniteError: W, H or G holds NaN or infinity.
    """
    W = finite(weight, "weight").double()
    H = Metric(input_metric, "input metric") if isinstance(input_metric, Tensor) else input_metric
    G = Metric(output_metric, "output metric") if isinstance(output_metric, Tensor) else output_metric
    near, far, W = (G, H, W.T) if len(W) <= W.shape[1] else (H, G, W)  # columns are on the smaller side from here on
    return gram_spectrum(W.T @ (W if far is None else far.covariance @ W), near)


def gram_spectrum(gram: Float[Tensor, "d d"], near: Metric | None) -> Spectrum:
    """The spectrum of a matrix from the products on its smaller side alone.

    Args:
        gram: W H Wᵀ where out <= in, elsewhere Wᵀ G W; float64.
        near: the metric of that side, G or H; None is the identity.
    """
    whitened = gram if near is None else near.root.T @ gram @ near.root
    ascending, V = torch.linalg.eigh((whitened + whitened.T) / 2)
    energies, V = ascending.flip(0).clamp_min(0), V.flip(1)
    kept = max(1, int((energies > NOISE * energies[0]).sum()))  # a zero matrix keeps one zero component
    energies, V = energies[:kept], V[:, :kept]
    vectors = V if near is None else near.root @ V
    duals = None if near is None else gram @ vectors / energies.clamp_min(torch.finfo(torch.float64).tiny)
    return Spectrum(
        singular_values=energies.sqrt(),
        vectors=vectors.T.float().contiguous(),
        duals=None if duals is None else duals.T.float().contiguous(),
        n_discarded=len(gram) - kept,
    )


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
