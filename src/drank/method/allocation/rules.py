r"""Ranks for every unit under one budget. Numbers only: no tensors, no files, no models.

A rule gives each unit a cost f_u(k), a storage gives it a price in parameters, and ``knapsack`` finds integer ranks.

* ``factors``: k (out + in). ``pivot``: k (out + in - k), k rows kept and the rest as combinations of them.
* The dense matrix is an option of its own at out * in, so that no unit ever costs more.

The rules (docs/method.md has the derivations):

* ``uniform``: the same share in every unit (SVD-LLM): the largest k whose price is within size_ratio * out * in.
* ``effective_rank``: D-Rank (arXiv:2509.25622) Eq. 7 per type, min Σ R_u / k_u, then queries and keys give a share β
  of their *parameters* to values (Eq. 9-12); parameters that a capped unit cannot use go back and are spent again.
* ``least_loss``: min Σ_u Σ_{i>k_u} s_i², one budget for the whole model; meaningful where all energies are in one unit,
  such as the nats of the K-FAC metric.
* ``lems``: the same, with every unit's curve scaled to a measured loss and weighed by depth (LEMS, ICML 2026).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from drank.method.allocation.knapsack import InfeasibleBudgetError, Options, merged, relax, solve
from drank.method.allocation.units import (
    DEFAULT,
    Allocation,
    Block,
    Choice,
    Menu,
    Unit,
    budget_of,
    by_kind,
    dense_choice,
    summed,
)

Cost = Callable[[NDArray[np.int64] | None, int], NDArray[np.float64] | float]  # of (ranks, bits); None is dense


def dense(units: Sequence[Unit]) -> Allocation:
    """Nothing is compressed."""
    return summed(units, {u.name: dense_choice(u, 0.0) for u in units}, budget_of(units, 1.0), 0.0)


def uniform(units: Sequence[Unit], size_ratio: float, menu: Menu = DEFAULT) -> Allocation:
    """The same share in every unit: the largest rank offered whose price is at most size_ratio * out * in.

    This is SVD-LLM's rule; rounding down in every unit leaves a little of the budget, as in the published tables. The
    objective is the number of parameters removed, and its bound the number that the budget asks to remove.

    Raises:
        InfeasibleBudgetError: a unit cannot have even its smallest rank within its share.
    """
    if size_ratio >= 1:
        return dense(units)
    choices = {}
    for unit in units:
        rank = menu.rank_at(unit, size_ratio)
        if rank is None:
            ranks = menu.ranks(unit)
            least = int(menu.price(unit, int(ranks[0]))) if len(ranks) else unit.dense_price
            raise InfeasibleBudgetError(
                f"{unit.name}: size_ratio {size_ratio} of {unit.dense_price} parameters is less than its smallest rank "
                f"costs ({least}); the least possible is {least / unit.dense_price:.4f}"
            )
        choices[unit.name] = menu.choice(unit, rank, float(unit.dense_price - menu.price(unit, rank)))
    budget = budget_of(units, size_ratio)
    return summed(units, choices, budget, float(budget_of(units, 1.0) - budget))


def effective_rank(units: Sequence[Unit], size_ratio: float, beta: float, menu: Menu = DEFAULT) -> Allocation:
    r"""D-Rank: min Σ R_u / k_u within each type's budget (Eq. 7), then a share β of queries and keys goes to values.

    Within a type of equal prices ω the continuous optimum is k_u = B √(R_u/ω) / Σ_j √(R_j ω); the integer optimum with
    caps and the dense option is found by ``knapsack.solve``, so a freed budget is spent again. Rebalancing follows
    Eq. 9-12 with parameters in the place of ranks (the two agree where all prices are equal): every value unit receives
    the same number of parameters on top of its own. Parameters that a dense one cannot use go back to queries and keys
    in proportion to their gifts. A rest that rounding leaves in one type is handed to the next.

    Raises:
        InfeasibleBudgetError: a type's budget does not pay for rank 1 everywhere.
    """
    kinds = sorted(by_kind(units), key=lambda members: (members[0].role != "value", members[0].kind))
    gifts = {
        members[0].kind: beta * size_ratio * sum(u.dense_price for u in members)
        for members in kinds
        if members[0].role in ("query", "key") and any(u.role == "value" for u in units)
    }
    pool = returned = float(sum(gifts.values()))
    choices: dict[str, Choice] = {}
    bound = left = 0.0
    for members in kinds:
        kind, is_value = members[0].kind, members[0].role == "value"
        gift = gifts.get(kind, 0.0)
        whole = size_ratio * sum(u.dense_price for u in members)
        budget = whole - gift + (returned * gift / pool if gift else 0.0) + left
        offers = [effective_rank_offer(u, menu) for u in members]
        solution = solve(offers, int(budget + 1e-6))
        chosen = _chosen(offers, solution.choices)
        left = budget - solution.weight
        bound += solution.bound
        if is_value and pool:
            share = pool / sum(u.role == "value" for u in units) + left / len(members)
            chosen = {o.unit.name: o.within(chosen[o.unit.name].price + share) for o in offers}
            returned -= sum(c.price for c in chosen.values()) - solution.weight - left
            left = 0.0
            bound += sum(c.objective_share for c in chosen.values()) - solution.cost
        choices |= chosen
    return summed(units, choices, budget_of(units, size_ratio), bound)


def least_loss(units: Sequence[Unit | Block], size_ratio: float, menu: Menu = DEFAULT) -> Allocation:
    r"""Least total loss: min Σ_u Σ_{i>k_u} s_i² within one budget for the whole model; a dense unit loses nothing.

    The energies of all units must have the same unit, as in the K-FAC metric: half their sum is the predicted loss in
    nats per token (docs/method.md). With an input-only metric a global budget is worse than uniform ranks.

    A block is one unit of the knapsack: its options are the lower hull, over cuts and ranks of its matrices, of price
    and loss. With blocks the gap stated is to the Lagrangian bound, which holds for every combination.

    With a menu in bytes, ``size_ratio`` is a share of the bytes in bfloat16, and every rank is on offer in all bits of
    the menu: bits, ranks and channels compete in one budget.

    Raises:
        InfeasibleBudgetError: the budget does not pay for the smallest rank everywhere.
    """
    budget = budget_of(units, size_ratio, in_bytes=menu.in_bytes)
    offers = [_cuts(unit, menu) for unit in units]
    search = relax if any(isinstance(unit, Block) for unit in units) else solve
    solution = search(offers, budget)
    choices: dict[str, Choice] = {}
    cuts: dict[str, int] = {}
    for unit, offer, option in zip(units, offers, solution.choices, strict=True):
        cut = int(offer.cuts[option])
        choices |= _chosen(offer.matrices[cut], offer.picks[option].tolist())
        if isinstance(unit, Block):
            cuts[unit.name] = cut
    found = replace(summed(units, choices, budget, solution.bound), cuts=cuts)
    return replace(found, budget=budget_of(units, 1.0), bytes_budget=budget) if menu.in_bytes else found


def depth_weight(layer: int, n_layers: int, slope: float, exponent: float = 0.0) -> float:
    r"""LEMS's weight of a layer: 1 for the last one, 1 + slope for the first.

    .. math:: 1 + γ \frac{\sum_{j=l}^{L-2} (j+1)^{-α}}{\sum_{j=0}^{L-2} (j+1)^{-α}}

    Where the exponent α is 0 the fraction is the share of the layers behind this one, (L - 1 - l) / (L - 1).
    """
    terms = [(j + 1) ** -exponent for j in range(n_layers - 1)]
    return 1 + slope * sum(terms[layer:]) / sum(terms) if terms else 1.0


def lems(
    units: Sequence[Unit],
    size_ratio: float,
    divergence: Mapping[str, Mapping[float, float]],
    slope: float,
    exponent: float = 0.0,
    menu: Menu = DEFAULT,
) -> Allocation:
    r"""LEMS (ICML 2026): least total loss, with every unit's curve through a measured divergence, weighed by depth.

    .. math:: \min \sum_u w_{l(u)} \, \mathrm{KL}_u \, \frac{\sum_{i>k_u} s_i^2}{\sum_{i>m_u} s_i^2}

    KL_u, in nats per token, is that of the model with u alone at rank m_u, and w is :func:`depth_weight`. Ranks k_u are
    those of two factors with .3 to .95 of the matrix's parameters (from .1 on for a size below a half), or the matrix
    stays dense. The integer program is ``knapsack``'s.

    Args:
        divergence: KL_u by unit name and by the ratio of parameters that m_u keeps; the smallest ratio counts.

    Raises:
        ValueError: a unit has no divergence.
        InfeasibleBudgetError: the budget does not pay for the smallest ranks.
    """
    n_layers, least = 1 + max(u.layer for u in units), 0.3 if size_ratio >= 0.5 else 0.1
    offers = []
    for unit in units:
        if not divergence.get(unit.name):
            raise ValueError(
                f"{unit.name}: has no divergence ({len(divergence)} units have); measure the targets that are allocated"
            )
        ratio, measured = min(divergence[unit.name].items())
        tail = float(unit.energies[DEFAULT.rank_at(unit, ratio) :].sum())
        scale = depth_weight(unit.layer, n_layers, slope, exponent) * measured / tail if tail else 0.0
        share = unit.dense_price / (unit.out_features + unit.in_features) / unit.full_rank
        weighed = replace(unit, energies=unit.energies * scale)
        offers.append(_loss_offer(weighed, replace(menu, floor=least * share, cap=0.95 * share)))
    budget = budget_of(units, size_ratio)
    solution = solve(offers, budget)
    return summed(units, _chosen(offers, solution.choices), budget, solution.bound)


@dataclass(frozen=True)
class Offer(Options):
    """Options of one matrix, for each of the menu's bits: its ranks, ascending, and last the dense matrix, if it may
    stay or no rank makes it smaller.
    """

    unit: Unit
    menu: Menu

    def choice(self, option: int) -> Choice:
        """The choice that an option stands for."""
        ranks, cost = self.menu.ranks(self.unit), float(self.costs[option])
        which, index = divmod(option, len(self.costs) // len(self.menu.bits))
        bits = self.menu.bits[which]
        if index == len(ranks):
            return dense_choice(self.unit, cost, bits)
        return self.menu.choice(self.unit, int(ranks[index]), cost, bits)

    def within(self, price: float) -> Choice:
        """The last option that a price pays for."""
        return self.choice(int(np.flatnonzero(self.weights <= price + 1e-6)[-1]))


def effective_rank_offer(unit: Unit, menu: Menu) -> Offer:
    """R_u / k_u of the ranks offered, R_u / full rank of the dense matrix."""
    return _offer(unit, menu, lambda ranks, bits: unit.effective_rank / (unit.full_rank if ranks is None else ranks))


def _loss_offer(unit: Unit, menu: Menu) -> Offer:
    tails = np.append(unit.energies[::-1].cumsum()[::-1], 0.0)

    def loss(ranks: NDArray[np.int64] | None, bits: int) -> NDArray[np.float64] | float:
        return unit.base_loss + (0.0 if ranks is None else tails[ranks]) + unit.rounded(ranks, bits)

    return _offer(unit, menu, loss)


def _offer(unit: Unit, menu: Menu, cost: Cost) -> Offer:
    ranks = menu.ranks(unit)
    offered = [ranks, None] if menu.dense or not len(ranks) else [ranks]
    weights = [np.atleast_1d(menu.weight(unit, k, bits)) for bits in menu.bits for k in offered]
    costs = [np.atleast_1d(cost(k, bits)) for bits in menu.bits for k in offered]
    return Offer(np.concatenate(weights), np.concatenate(costs), unit, menu)


def _chosen(offers: Sequence[Offer], options: Sequence[int]) -> dict[str, Choice]:
    return {offer.unit.name: offer.choice(option) for offer, option in zip(offers, options, strict=True)}


@dataclass(frozen=True)
class _Cuts(Options):
    """Options of a unit: option j is cut cuts[j] with option picks[j, i] of its matrix i, matrices[cuts[j]][i]."""

    cuts: NDArray[np.int64]
    picks: NDArray[np.int64]
    matrices: list[list[Offer]]


def _cuts(unit: Unit | Block, menu: Menu) -> _Cuts:
    matrices = [[_loss_offer(matrix, menu) for matrix in cut] for cut in unit.cuts]
    options, picks = zip(*map(merged, matrices), strict=True)
    return _Cuts(
        np.concatenate([of_cut.weights for of_cut in options]),
        np.concatenate([of_cut.costs for of_cut in options]),
        np.repeat(np.arange(len(picks)), [len(of_cut) for of_cut in picks]),
        np.concatenate(picks),
        matrices,
    )
