r"""The ranks of D-Rank's released code, which are not those of its paper (arXiv:2509.25622). Numbers only.

Written from a description of that code (github.com/Rainbow0427/D_rank at 0ef4a69), to be compared with the paper's own
rule, ``allocation.effective_rank``. What the paper does not say:

* A type falls back to uniform ranks unless Eq. 7 drops less energy. Gate is always uniform. Queries, keys and values
  never are; where key/value heads are grouped, queries and keys always are and values go by the test.
* Eq. 7 is rounded, clamped, and moved towards the budget in a few steps of ±1.
* Every unit is priced as factors, k ω with ω = out + in, even where the matrix itself is smaller.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from drank.method.allocation.knapsack import InfeasibleBudgetError, Options, relax
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

    * Ranks end at the number of components that a unit has; there, at the smaller side of one layer, and those of
      values at 4096.
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
    stepped_again: list[list[Unit]] = []
    for members in by_kind(ordered).values():
        budget = budget_of(members, size_ratio)
        eq7, uniform = _eq7(members, size_ratio), _uniform(members, size_ratio)
        if _is_dynamic(members, eq7, uniform, grouped):
            ranks |= _named(members, _stepped(members, eq7, budget))
            if grouped and members[0].role == "value":
                stepped_again.append(members)
        else:
            ranks |= _named(members, _lowered(members, uniform, budget))
        _check_feasible(members, ranks, budget, size_ratio)
    exchanged = ranks | _exchanged(ordered, ranks, beta)
    for members in stepped_again:
        before, after = _ranks(members, ranks), _ranks(members, exchanged)
        budget = budget_of(members, size_ratio) + int(_prices(members) @ (after - before))
        exchanged |= _named(members, _stepped(members, after, budget))
    choices = {u.name: _choice(u, exchanged[u.name]) for u in units}
    total = budget_of(units, size_ratio)
    return summed(units, choices, total, relax([_options(u) for u in units], total).bound)


def _has_grouped_heads(units: Sequence[Unit]) -> bool:
    # Sums over the model, since a stack of several layers is wider than a layer.
    values, queries = (sum(u.out_features for u in units if u.role == role) for role in ("value", "query"))
    return 0 < values < queries


def _is_dynamic(members: Sequence[Unit], eq7: Integers, uniform: Integers, grouped: bool) -> bool:
    """Whether a type follows Eq. 7 rather than falling back to uniform ranks."""
    role = members[0].role
    if role == "gate" or (grouped and role in ("query", "key")):
        return False
    if role in ("query", "key", "value") and not grouped:
        return True
    return _tail_energy(members, eq7) < _tail_energy(members, uniform)


def _eq7(members: Sequence[Unit], size_ratio: float) -> Integers:
    prices, R = _prices(members), np.array([u.effective_rank for u in members])
    budget = size_ratio * sum(u.dense_price for u in members)
    continuous = np.sqrt(R / prices) * budget / np.sqrt(R * prices).sum()
    return np.clip(np.rint(continuous).astype(np.int64), 1, _caps(members))


def _uniform(members: Sequence[Unit], size_ratio: float) -> Integers:
    continuous = np.array([size_ratio * u.dense_price for u in members]) / _prices(members)
    return np.clip((continuous + 1e-9).astype(np.int64), 1, _caps(members))


def _tail_energy(members: Sequence[Unit], ranks: Integers) -> float:
    return float(sum(u.energies[k:].sum() for u, k in zip(members, ranks, strict=True)))


def _stepped(members: Sequence[Unit], ranks: Integers, budget: int) -> Integers:
    """At most two steps of ±1 a unit towards the budget.

    Only exact equality ends them early. Elsewhere they take ranks from the unit of least R/ω and give them to that of
    the greatest, to and fro across the budget; a last one may have to be taken back.
    """
    ranks, prices, sensitivity = ranks.copy(), _prices(members), _sensitivity(members)
    for _ in range(2 * len(members)):
        left = budget - int(prices @ ranks)
        movable = ranks > 1 if left < 0 else ranks < _caps(members)
        if left == 0 or not movable.any():
            break
        if left < 0:
            ranks[np.where(movable, sensitivity, np.inf).argmin()] -= 1
        else:
            ranks[np.where(movable, sensitivity, -np.inf).argmax()] += 1
    return _lowered(members, ranks, budget)


def _lowered(members: Sequence[Unit], ranks: Integers, budget: int) -> Integers:
    """Ranks within the budget, from the unit of least R/ω that still has two; all 1 where nothing is."""
    ranks, prices, sensitivity = ranks.copy(), _prices(members), _sensitivity(members)
    while prices @ ranks > budget and (ranks > 1).any():
        ranks[np.where(ranks > 1, sensitivity, np.inf).argmin()] -= 1
    return ranks


def _exchanged(units: Sequence[Unit], ranks: dict[str, int], beta: float) -> dict[str, int]:
    """Ranks of queries, keys and values after values were given the share β; none where a side is missing.

    Values take in proportion to their outputs, hence to the layers of a stack; what one cannot use goes rank by rank to
    the smallest other, and what none can use back to queries and keys in proportion to what they gave.
    """
    givers = [u for u in units if u.role in ("query", "key")]
    takers = [u for u in units if u.role == "value"]
    giving, taking = _ranks(givers, ranks), _ranks(takers, ranks)
    given = np.minimum(np.rint(beta * giving).astype(np.int64), giving - 1)
    pool = int(_prices(givers) @ given)
    if pool == 0 or not takers:
        return {}
    prices, caps = _prices(takers), _caps(takers)
    outputs = np.array([u.out_features for u in takers], dtype=np.int64)
    taken = np.minimum(taking + _shared(pool, outputs, prices), caps)
    left = pool - int(prices @ (taken - taking))
    while (able := (taken < caps) & (prices <= left)).any():
        smallest = np.where(able, taken, np.iinfo(np.int64).max).argmin()
        taken[smallest] += 1
        left -= int(prices[smallest])
    returned = _shared(left, given * _prices(givers), _prices(givers))
    return _named(givers, giving - given + returned) | _named(takers, taken)


def _shared(pool: int, weights: Integers, prices: Integers) -> Integers:
    """Ranks that a pool of parameters buys, in proportion to the weights; then one more each, in order, while it lasts.

    In Python's integers: a pool times a weight, both in parameters, may exceed 64 bits.
    """
    whole = sum(weights.tolist())
    bought = []
    for weight, price in zip(weights.tolist(), prices.tolist(), strict=True):
        bought.append(pool * weight // (whole * price))
    left = pool - sum(n * price for n, price in zip(bought, prices.tolist(), strict=True))
    for j, price in enumerate(prices.tolist()):
        if weights[j] > 0 and price <= left:
            bought[j] += 1
            left -= price
    return np.array(bought, dtype=np.int64)


def _check_feasible(members: Sequence[Unit], ranks: dict[str, int], budget: int, size_ratio: float) -> None:
    least = sum(_choice(u, ranks[u.name]).price for u in members)
    if least > budget:
        raise InfeasibleBudgetError(
            f"{members[0].kind}: size_ratio {size_ratio} leaves {budget} parameters to this type, below the least "
            f"possible {least} (rank 1 everywhere); raise size_ratio to "
            f"{least / sum(u.dense_price for u in members):.4f} or more"
        )


def _choice(unit: Unit, rank: int) -> Choice:
    price = rank * (unit.out_features + unit.in_features)
    if price >= unit.dense_price:
        return dense_choice(unit, unit.effective_rank / unit.full_rank)
    return Choice(rank, "factors", price, unit.effective_rank / rank)


def _options(unit: Unit) -> Options:
    """What any allocation of this storage may choose from; the bound needs it."""
    ranks = DEFAULT.ranks(unit)
    prices = np.append(DEFAULT.price(unit, ranks), unit.dense_price).astype(np.int64)
    return Options(prices, unit.effective_rank / np.append(ranks, unit.full_rank))


def _prices(members: Sequence[Unit]) -> Integers:
    """ω, parameters a rank."""
    return np.array([u.out_features + u.in_features for u in members], dtype=np.int64)


def _caps(members: Sequence[Unit]) -> Integers:
    return np.array([min(u.full_rank, len(u.energies)) for u in members], dtype=np.int64)


def _sensitivity(members: Sequence[Unit]) -> NDArray[np.float64]:
    return np.array([u.effective_rank for u in members]) / _prices(members)


def _ranks(members: Sequence[Unit], ranks: dict[str, int]) -> Integers:
    return np.array([ranks[u.name] for u in members], dtype=np.int64)


def _named(members: Sequence[Unit], ranks: Integers) -> dict[str, int]:
    return dict(zip((u.name for u in members), ranks.tolist(), strict=True))
