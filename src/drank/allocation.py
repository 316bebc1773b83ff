r"""Ranks for every unit under one budget. Numbers only: no tensors, no files, no models.

A rule gives each unit a cost f_u(k) and a price; the solver of ``knapsack`` finds integer ranks. Prices are parameters:

* ``factors``: k (out + in); the dense matrix is an option of its own at out * in, so that no unit ever costs more.

The rules are those of the literature (docs/method.md has the derivations):

* ``uniform``: the same share in every unit (SVD-LLM): the largest k whose price is within size_ratio * out * in.
* ``effective_rank``: D-Rank (arXiv:2509.25622) Eq. 7 a type, min Σ R_u / k_u, then queries and keys give a share β of
  their *parameters* to values (Eq. 9-12); what a capped unit cannot use goes back and is spent again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drank.knapsack import InfeasibleBudgetError, Options, solve


@dataclass(frozen=True)
class Unit:
    """One matrix to be given a rank.

    Attributes:
        kind: matrices of one kind share a budget under the rules that allocate by type (``q_proj``, ...).
        role: "query", "key", "value" where the model knows it; rebalancing moves parameters between those.
        energies: squared singular values in the metric, descending; Σ_{i>k} is the loss of keeping k.
        effective_rank: R of the spectrum, 1 <= R <= len(energies).
    """

    name: str
    kind: str
    role: str | None
    layer: int
    out_features: int
    in_features: int
    energies: NDArray[np.float64]
    effective_rank: float

    @property
    def dense_price(self) -> int:
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class Choice:
    """What a unit was given. form "dense" keeps the matrix as it is: rank = full rank, price = out * in, loss 0."""

    rank: int
    form: str
    price: int
    objective_share: float


@dataclass(frozen=True)
class Allocation:
    """Choices by unit name, with what an auditor asks: objective, certified bound, budget and what was spent of it."""

    choices: dict[str, Choice]
    objective: float
    bound: float
    budget: int
    price: int
    targeted_parameters: int

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 where the ranks are optimal for the rule."""
        return max(0.0, self.objective - self.bound) / abs(self.objective) if self.objective else 0.0

    @property
    def kept_ratio(self) -> float:
        return self.price / self.targeted_parameters


def rank_price(unit: Unit, rank: int) -> int:
    """Parameters of two factors of this rank: k (out + in)."""
    return rank * (unit.out_features + unit.in_features)


def largest_factored_rank(unit: Unit) -> int:
    """Largest rank whose factors are smaller than the dense matrix (0 where there is none: a 1 x n matrix)."""
    return min(len(unit.energies), (unit.dense_price - 1) // (unit.out_features + unit.in_features))


def loss(unit: Unit, choice: Choice) -> float:
    """Energy dropped, Σ_{i>k} s_i², in the unit of the metric; 0 for a dense unit."""
    return 0.0 if choice.form == "dense" else float(unit.energies[choice.rank :].sum())


def dense(units: Sequence[Unit]) -> Allocation:
    """Nothing is compressed."""
    return _allocation(units, {u.name: _dense_choice(u, 0.0) for u in units}, sum(u.dense_price for u in units), 0.0)


def uniform(units: Sequence[Unit], size_ratio: float) -> Allocation:
    """The same share in every unit: the largest rank whose factors cost at most size_ratio * out * in.

    This is SVD-LLM's rule; rounding down in every unit leaves a little of the budget, as in the published tables. The
    objective is the number of parameters removed, and its bound what the budget asks for.

    Raises:
        InfeasibleBudgetError: a unit cannot have even one rank within its share.
    """
    choices = {}
    for unit in units:
        rank = int(size_ratio * unit.dense_price / rank_price(unit, 1) + 1e-9)
        if rank < 1:
            raise InfeasibleBudgetError(
                f"{unit.name}: size_ratio {size_ratio} of {unit.dense_price} parameters is less than one rank "
                f"({rank_price(unit, 1)}); the least possible is {rank_price(unit, 1) / unit.dense_price:.4f}"
            )
        capped = min(rank, len(unit.energies), unit.full_rank)
        if size_ratio >= 1 or rank_price(unit, rank) >= unit.dense_price:
            choices[unit.name] = _dense_choice(unit, 0.0)
        else:
            price = rank_price(unit, capped)
            choices[unit.name] = Choice(capped, "factors", price, float(unit.dense_price - price))
    budget = _budget(units, size_ratio)
    return _allocation(units, choices, budget, float(sum(u.dense_price for u in units) - budget))


def effective_rank(units: Sequence[Unit], size_ratio: float, beta: float) -> Allocation:
    r"""D-Rank: min Σ R_u / k_u within each type's budget (Eq. 7), then a share β of queries and keys goes to values.

    Within a type of equal prices ω the continuous optimum is k_u = B √(R_u/ω) / Σ_j √(R_j ω); the integer optimum with
    caps and the dense option is found by ``knapsack.solve``, so a freed budget is spent again. Rebalancing follows
    Eq. 9-12 with parameters in the place of ranks (the two agree where all prices are equal): every value unit receives
    the same number of parameters on top of its own; what it cannot use, being dense already, goes back to queries and
    keys in proportion to what they gave. What rounding leaves in one type is handed to the next.

    Raises:
        InfeasibleBudgetError: a type's budget does not pay for rank 1 everywhere.
    """
    kinds = sorted(_by_kind(units).values(), key=lambda members: (members[0].role != "value", members[0].kind))
    gifts = {
        members[0].kind: beta * size_ratio * _dense_price(members)
        for members in kinds
        if members[0].role in ("query", "key") and any(u.role == "value" for u in units)
    }
    pool = returned = float(sum(gifts.values()))
    choices: dict[str, Choice] = {}
    bound = left = 0.0
    for members in kinds:
        kind, is_value = members[0].kind, members[0].role == "value"
        gift = gifts.get(kind, 0.0)
        budget = size_ratio * _dense_price(members) - gift + (returned * gift / pool if gift else 0.0) + left
        solution = solve([_effective_rank_options(u) for u in members], int(budget + 1e-6))
        chosen = {u.name: _effective_rank_choice(u, j) for u, j in zip(members, solution.choices, strict=True)}
        left = budget - solution.weight
        bound += solution.bound
        if is_value and pool:
            share = pool / sum(u.role == "value" for u in units) + left / len(members)
            chosen = {u.name: _grown(u, chosen[u.name], share) for u in members}
            returned -= sum(c.price for c in chosen.values()) - solution.weight - left
            left = 0.0
            bound += sum(c.objective_share for c in chosen.values()) - solution.cost
        choices |= chosen
    return _allocation(units, choices, _budget(units, size_ratio), bound)


def _effective_rank_options(unit: Unit) -> Options:
    ranks = np.arange(1, largest_factored_rank(unit) + 1)
    return Options(
        weights=np.append(ranks * rank_price(unit, 1), unit.dense_price).astype(np.int64),
        costs=np.append(unit.effective_rank / ranks, unit.effective_rank / unit.full_rank),
    )


def _effective_rank_choice(unit: Unit, option: int) -> Choice:
    rank = option + 1
    if rank > largest_factored_rank(unit):
        return _dense_choice(unit, unit.effective_rank / unit.full_rank)
    return Choice(rank, "factors", rank_price(unit, rank), unit.effective_rank / rank)


def _grown(unit: Unit, choice: Choice, extra: float) -> Choice:
    """The choice that the price of this one and so many parameters more will buy."""
    affordable = int((choice.price + extra + 1e-6) / rank_price(unit, 1))
    return _effective_rank_choice(unit, min(affordable, largest_factored_rank(unit) + 1) - 1)


def _dense_choice(unit: Unit, objective_share: float) -> Choice:
    return Choice(unit.full_rank, "dense", unit.dense_price, objective_share)


def _by_kind(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return kinds


def _dense_price(units: Sequence[Unit]) -> int:
    return sum(u.dense_price for u in units)


def _budget(units: Sequence[Unit], size_ratio: float) -> int:
    return int(size_ratio * _dense_price(units) + 1e-6)


def _allocation(units: Sequence[Unit], choices: dict[str, Choice], budget: int, bound: float) -> Allocation:
    objective = float(sum(choices[u.name].objective_share for u in units))
    price = sum(c.price for c in choices.values())
    return Allocation(choices, objective, min(bound, objective), budget, price, _dense_price(units))
