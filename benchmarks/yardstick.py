"""The yardstick: what D-Rank's released code computes for a matrix, and how it accumulates covariances.

Written from a description of that code (github.com/Rainbow0427/D_rank at 0ef4a69): linear algebra alone, no files, no
devices, no model classes. Its covariances are sums XᵀX in float32, one for queries, keys and values together and one
for gate and up together. For *every* new ratio it whitens each matrix (Cholesky factor S of XᵀX and its inverse,
float64), takes the singular values of S Wᵀ in float32 for the effective rank, whitens again, and takes the full SVD of
S Wᵀ in float64 for the factors S⁻¹ U Σ and Vᵀ.
"""

import torch
from torch import Tensor


def accumulated(total: Tensor | None, x: Tensor) -> Tensor:
    """The running sum of XᵀX with x (tokens, d) added, float32; the released hook's."""
    rows = x.detach().float()
    product = rows.T @ rows
    return product if total is None else total.add_(product)


def whitened(xtx: Tensor) -> tuple[Tensor, Tensor]:
    """S with SᵀS = XᵀX, upper triangular, and S⁻¹, float64; an XᵀX that is not positive is shifted until it is."""
    matrix = xtx.double()
    try:
        S = torch.linalg.cholesky(matrix).T
    except torch.linalg.LinAlgError:
        shift = 7e-6 - torch.linalg.eigvalsh(matrix)[0]
        S = torch.linalg.cholesky(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype)).T
    return S, torch.linalg.inv(S)


def singular_values(weight: Tensor, S: Tensor) -> Tensor:
    """Singular values of S Wᵀ, in float32."""
    return torch.linalg.svdvals(S.float() @ weight.T.float())


def factors(weight: Tensor, S: Tensor, S_inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Basis (in, r) and coefficients (r, out), float32, r = min(in, out); W_k = (basis[:, :k] @ coefficients[:k])ᵀ."""
    U, sigma, Vh = torch.linalg.svd(S @ weight.T.double(), full_matrices=False)
    return (S_inverse @ U @ torch.diag(sigma)).float(), Vh.float()
