r"""The ranks of D-Rank's released code, which are not those of its paper (arXiv:2509.25622). Numbers only.

Written from a description of that code (github.com/Rainbow0427/D_rank at 0ef4a69), to be compared with the paper's own
rule, ``allocation.effective_rank``. The paper does not say that:

* A type falls back to uniform ranks unless Eq. 7 drops less energy. Gate is always uniform. Queries, keys and values
  never are; where key/value heads are grouped, queries and keys always are and values go by the test.
* Eq. 7 is rounded, clamped, and moved towards the budget in a few steps of ±1.
* Every unit is priced as factors, k ω with ω = out + in, even where the matrix itself is smaller.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from drank.method.allocation.knapsack import InfeasibleBudgetError, relax
from drank.method.allocation.rules import effective_rank_offer
from drank.method.allocation.units import (
    DEFAULT,
    Allocation,
    Choice,
    Menu,
    Unit,
    budget_of,
    by_kind,
    dense_choice,
    summed,
)

Integers = NDArray[np.int64]


def released(units: Sequence[Unit], size_ratio: float, beta: float, menu: Menu = DEFAULT) -> Allocation:
    r"""Eq. 7 or uniform ranks for each type, then a share β of the ranks of queries and keys for values.

    .. math:: k_u = B \sqrt{R_u/ω_u} \Big/ \sum_j \sqrt{R_j ω_j}, \qquad
        k_u^\mathrm{uniform} = \lfloor \mathrm{size\_ratio} \cdot \mathrm{out} \cdot \mathrm{in} / ω_u \rfloor

    with B = size_ratio Σ out·in over the type, in parameters. Eq. 7 is adopted where its Σ_u Σ_{i>k_u} s_i², taken
    before the steps of ±1, is the smaller one. The exchange is in parameters: where all ω are equal, that is the
    released code's exchange of ranks; elsewhere, the variant for grouped heads that it has commented out. Its constants
    are β = 0.2, and 0.1 for grouped heads.

    Read into the description, or changed:

    * Ranks end at the number of components that a unit has; there, at the smaller side of one layer, values at 4096.
    * Steps of ±1 that end above the type's budget are followed by steps down; there, the excess stays.
    * Uniform ranks take no steps. With grouped heads, values that follow Eq. 7 take a second pass after the exchange.
    * Heads are grouped where all value units together have fewer outputs than all query units.
    * Types unknown to the released code (fused projections) go by the test of energies.

    A unit whose factors would not be smaller than the matrix keeps its rank in all of this but is stored dense, and the
    parameters that this saves are not spent again. The objective is Σ R_u / k_u, with k the full rank of a dense unit.
    No optimality is claimed: the bound is that of any ranks within the whole budget.

    Raises:
        ValueError: the menu is not the default one.
        InfeasibleBudgetError: a type's budget does not pay for rank 1 everywhere.
    """
    if menu != DEFAULT:
        raise ValueError(
            f"allocation 'released' with {menu}: the released code offers every rank of two factors and nothing else; "
            f"leave the menu at its defaults, or allocate by effective_rank"
        )
    ordered = sorted(units, key=lambda u: (u.layer, u.name))
    grouped = _has_grouped_heads(ordered)
    ranks: dict[str, int] = {}
    stepped_again: list[_Type] = []
    for members in by_kind(ordered):
        kind, budget = _Type(members), budget_of(members, size_ratio)
        eq7, uniform = kind.eq7(size_ratio), kind.uniform(size_ratio)
        dynamic = _is_dynamic(members[0].role, grouped, kind.tail_energy(eq7) < kind.tail_energy(uniform))
        ranks |= kind.named(kind.stepped(eq7, budget) if dynamic else kind.lowered(uniform, budget))
        if dynamic and grouped and members[0].role == "value":
            stepped_again.append(kind)
        least = sum(min(int(DEFAULT.price(u, ranks[u.name])), u.dense_price) for u in members)
        if least > budget:
            nearest = f"{least / budget_of(members, 1.0):.4f}"
            raise InfeasibleBudgetError(
                f"{members[0].kind}: size_ratio {size_ratio} leaves {budget} parameters to this type, below the least "
                f"possible {least} (rank 1 everywhere); raise size_ratio to {nearest} or more"
            )
    exchanged = ranks | _exchanged(ordered, ranks, beta)
    for kind in stepped_again:
        before, after = kind.ranks(ranks), kind.ranks(exchanged)
        budget = budget_of(kind.units, size_ratio) + int(kind.prices @ (after - before))
        exchanged |= kind.named(kind.stepped(after, budget))
    choices = {u.name: _choice(u, exchanged[u.name]) for u in units}
    total = budget_of(units, size_ratio)
    bound = relax([effective_rank_offer(u, DEFAULT) for u in units], total).bound
    return summed(units, choices, total, bound)


class _Type:
    """Units as arrays in their order: ω (parameters per rank), R, R/ω, and the largest ranks."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.prices = np.array([u.out_features + u.in_features for u in units], dtype=np.int64)
        self.effective_ranks = np.array([u.effective_rank for u in units])
        self.sensitivity = self.effective_ranks / self.prices
        self.caps = np.array([min(u.full_rank, len(u.energies)) for u in units], dtype=np.int64)

    def ranks(self, by_name: dict[str, int]) -> Integers:
        return np.array([by_name[u.name] for u in self.units], dtype=np.int64)

    def named(self, ranks: Integers) -> dict[str, int]:
        return dict(zip((u.name for u in self.units), ranks.tolist(), strict=True))

    def eq7(self, size_ratio: float) -> Integers:
        R, budget = self.effective_ranks, size_ratio * sum(u.dense_price for u in self.units)
        continuous = np.sqrt(self.sensitivity) * budget / np.sqrt(R * self.prices).sum()
        return np.clip(np.rint(continuous).astype(np.int64), 1, self.caps)

    def uniform(self, size_ratio: float) -> Integers:
        continuous = np.array([size_ratio * u.dense_price for u in self.units]) / self.prices
        return np.clip((continuous + 1e-9).astype(np.int64), 1, self.caps)

    def tail_energy(self, ranks: Integers) -> float:
        return float(sum(u.energies[k:].sum() for u, k in zip(self.units, ranks, strict=True)))

    def stepped(self, ranks: Integers, budget: int) -> Integers:
        """At most two steps of ±1 per unit towards the budget.

        Only exact equality ends them early. Elsewhere they take ranks from the unit of least R/ω and give them to the
        unit of the greatest, to and fro across the budget; a last one may have to be taken back.
        """
        ranks = ranks.copy()
        for _ in range(2 * len(ranks)):
            left = budget - int(self.prices @ ranks)
            movable = ranks > 1 if left < 0 else ranks < self.caps
            if left == 0 or not movable.any():
                break
            if left < 0:
                ranks[np.where(movable, self.sensitivity, np.inf).argmin()] -= 1
            else:
                ranks[np.where(movable, self.sensitivity, -np.inf).argmax()] += 1
        return self.lowered(ranks, budget)

    def lowered(self, ranks: Integers, budget: int) -> Integers:
        """Ranks within the budget, taken from the unit of least R/ω that still has two; all 1 where nothing is."""
        ranks = ranks.copy()
        while self.prices @ ranks > budget and (ranks > 1).any():
            ranks[np.where(ranks > 1, self.sensitivity, np.inf).argmin()] -= 1
        return ranks


def _has_grouped_heads(units: Sequence[Unit]) -> bool:
    # Sums over the model, since a stack of several layers is wider than a layer.
    values, queries = (sum(u.out_features for u in units if u.role == role) for role in ("value", "query"))
    return 0 < values < queries


def _is_dynamic(role: str | None, grouped: bool, drops_less: bool) -> bool:
    """True if a type follows Eq. 7 rather than falling back to uniform ranks."""
    if role == "gate" or (grouped and role in ("query", "key")):
        return False
    return drops_less or (role in ("query", "key", "value") and not grouped)


def _exchanged(units: Sequence[Unit], ranks: dict[str, int], beta: float) -> dict[str, int]:
    """Ranks of queries, keys and values after values were given the share β; none where a side is missing.

    Values take in proportion to their outputs, hence to the layers of a stack. A rest that one cannot use goes rank by
    rank to the smallest other; a rest that none can use goes back to queries and keys in proportion to their gifts.
    """
    givers = _Type([u for u in units if u.role in ("query", "key")])
    takers = _Type([u for u in units if u.role == "value"])
    giving, taking = givers.ranks(ranks), takers.ranks(ranks)
    given = np.minimum(np.rint(beta * giving).astype(np.int64), giving - 1)
    pool = int(givers.prices @ given)
    if pool == 0 or not takers.units:
        return {}
    outputs = np.array([u.out_features for u in takers.units], dtype=np.int64)
    taken = np.minimum(taking + _shared(pool, outputs, takers.prices), takers.caps)
    left = pool - int(takers.prices @ (taken - taking))
    while (able := (taken < takers.caps) & (takers.prices <= left)).any():
        smallest = np.where(able, taken, np.iinfo(np.int64).max).argmin()
        taken[smallest] += 1
        left -= int(takers.prices[smallest])
    returned = _shared(left, given * givers.prices, givers.prices)
    return givers.named(giving - given + returned) | takers.named(taken)


def _shared(pool: int, weights: Integers, prices: Integers) -> Integers:
    """Ranks that a pool of parameters buys, in proportion to the weights; then one more each, in order, while it lasts.

    In Python's integers: a pool times a weight, both in parameters, may exceed 64 bits.
    """
    shares, costs = weights.tolist(), prices.tolist()
    bought = [pool * share // (sum(shares) * cost) for share, cost in zip(shares, costs, strict=True)]
    left = pool - sum(n * cost for n, cost in zip(bought, costs, strict=True))
    for j, cost in enumerate(costs):
        if shares[j] > 0 and cost <= left:
            bought[j] += 1
            left -= cost
    return np.array(bought, dtype=np.int64)


def _choice(unit: Unit, rank: int) -> Choice:
    if DEFAULT.price(unit, rank) >= unit.dense_price:
        return dense_choice(unit, unit.effective_rank / unit.full_rank)
    return DEFAULT.choice(unit, rank, unit.effective_rank / rank)
