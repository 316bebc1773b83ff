r"""Channels of an MLP removed, and the matrix that reads them corrected in closed form. Knows tensors only.

Channel j of an MLP is row j of the matrices before its nonlinearity and column j of the one behind it, W = ``down`` of
shape (out, n). In the metric tr(G D H Dᵀ), removing the columns R of W, with the best correction of the others, costs

.. math:: \mathrm{tr}\bigl((W^\top G W)_{RR} \, [(H^{-1})_{RR}]^{-1}\bigr), \qquad
          W \leftarrow W - W_R [(H^{-1})_{RR}]^{-1} (H^{-1})_{R,:}

after which H⁻¹ is downdated in the same way: Optimal Brain Surgeon (Hassibi and Stork, 1993) on columns. The cost is in
the unit of dropped squared singular values of the same metric, so channels and ranks compete in one budget.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from drank.method.spectrum import Metric


class Cut(NamedTuple):
    """An MLP with fewer channels.

    Attributes:
        alive: (m,) channels kept, ascending.
        down: (out, m) float64, the columns kept of W, corrected for those removed.
        loss: cost of the removal in the metric, before any rank is reduced.
        gram: (out, out) float64, W H Wᵀ with ``down`` as W and the rows and columns of H that are kept.
    """

    alive: Int64[Tensor, " m"]
    down: Float[Tensor, "out m"]
    loss: float
    gram: Float[Tensor, "out out"]


def remove_channels(
    down: Float[Tensor, "out n"],
    input_metric: Float[Tensor, "n n"],
    output_metric: Metric | Float[Tensor, "out out"],
    kept: Sequence[int],
    at_once: int = 48,
) -> list[Cut]:
    """The MLP with each number of channels in ``kept``, which falls.

    Channels go greedily, least single cost (WᵀGW)_jj / (H⁻¹)_jj first, ``at_once`` of them between two downdates. The
    loss of a cut is exact for the channels removed; others might cost less.

    Raises:
        ValueError: ``kept`` does not fall, or leaves 1 ... n.
        torch.linalg.LinAlgError: the input metric is singular; give it damping.
    """
    n, out = down.shape[1], len(down)
    if any(not 1 <= m <= n for m in kept) or any(a <= b for a, b in pairwise(kept)):
        raise ValueError(f"channels kept must fall from at most {n} to at least 1; got {list(kept)}")
    G = output_metric if isinstance(output_metric, Metric) else Metric(output_metric, "output metric")
    # The correction acts from the right, so W and G^½ W (any root) take it together; the second has the costs.
    W = torch.cat([down.double(), G.root.T @ down.double()])
    gram = W[:out] @ input_metric.double() @ W[:out].T
    inverse = torch.linalg.inv(input_metric.double())
    alive = torch.ones(n, dtype=torch.bool, device=down.device)
    n_alive, loss, cuts = n, 0.0, []
    for m in kept:
        while n_alive > m:
            costs = ((W[out:] ** 2).sum(0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
            removed = costs.argsort()[: min(at_once, n_alive - m)]
            block = torch.linalg.inv(inverse[removed][:, removed])
            loss += float(((W[out:, removed] @ block) * W[out:, removed]).sum())
            # W loses a part that is orthogonal in H to what is left, so the products subtract (Pythagoras).
            gram = gram - W[:out, removed] @ block @ W[:out, removed].T
            # In place and with the removed channels, whose entries become zero: copies of the rest would cost more.
            step = block @ inverse[removed]
            torch.addmm(W, W[:, removed], step, alpha=-1, out=W)
            torch.addmm(inverse, inverse[:, removed], step, alpha=-1, out=inverse)
            alive[removed] = False
            n_alive -= len(removed)
        cuts.append(Cut(alive.nonzero()[:, 0], W[:out, alive], loss, gram))
    return cuts


def row_grams(
    weight: Float[Tensor, "n in"], output_metric: Float[Tensor, "n n"], kept: Sequence[Int64[Tensor, " _"]]
) -> Iterator[Float[Tensor, "in in"]]:
    r"""Wᵀ G W, float64, over the kept rows of a weight, for sets of rows that shrink.

    Each follows from the one before: with L its rows and R the rows removed now,

    .. math:: W_{L \setminus R}^\top G W_{L \setminus R} = W_L^\top G W_L - W_R^\top G W_L - W_L^\top G W_R
              + W_R^\top G_{RR} W_R

    Args:
        kept: ascending indices, each a subset of the one before.
    """
    W, G = weight.double(), output_metric.double()
    alive = torch.ones(len(W), dtype=torch.bool, device=W.device)
    product = G @ W
    gram = W.T @ product
    for rows in kept:
        removed = alive.clone()
        removed[rows] = False
        if removed.any():
            gone = W[removed]
            across = gone.T @ product[removed]
            gram = gram - across - across.T + gone.T @ G[removed][:, removed] @ gone
            torch.addmm(product, G[:, removed], gone, alpha=-1, out=product)
            alive &= ~removed
        yield gram
