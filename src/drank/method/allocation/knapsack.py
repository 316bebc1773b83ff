r"""The integer program under every allocation: one option per unit, least total cost within a budget.

.. math:: \min \sum_u c_u(j_u) \quad\text{s.t.}\quad \sum_u w_u(j_u) \le B

a multiple-choice knapsack with option costs c (any unit, the same in all units of the model) and integer weights w
(parameters or bytes). Numbers only: no tensors, no models.

The lower convex hull of each unit's (weight, cost) points gives the linear relaxation exactly, and with it a bound: no
solution costs less. The relaxation, rounded down and filled up, gives a first solution, which only options with a
reduced cost below the gap can still beat. Where their weights have a common divisor, as ranks of matrices of one shape
have, the bound leaves out the part of the budget that no choice can reach. If a gap is left, SciPy's HiGHS searches
these options alone, so the integer program is small however many ranks there are.

Reference: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), ch. 11.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


class InfeasibleBudgetError(ValueError):
    """The cheapest choice of every unit costs more than the budget; the message names the nearest feasible value.

    Attributes:
        least: the smallest budget that would do, where it is known in the budget's unit.
    """

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Options:
    """The offer of one unit: option j weighs weights[j] parameters, or bytes, and costs costs[j]."""

    weights: NDArray[np.int64]
    costs: NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """choices[u] indexes the options of unit u; bound <= optimum <= cost, and gap = (cost - bound) / |cost|.

    Attributes:
        multiplier: cost saved per parameter where the relaxation ran out of budget.
    """

    choices: list[int]
    weight: int
    cost: float
    bound: float
    multiplier: float

    @property
    def gap(self) -> float:
        return max(0.0, self.cost - self.bound) / abs(self.cost) if self.cost else 0.0


def solve(units: Sequence[Options], budget: int, *, relative_gap: float = 1e-4, nodes: int = 20) -> Solution:
    """Least-cost choice of one option per unit within the budget, with a certified bound.

    Args:
        units: options of each unit, in any order.
        budget: in the unit of the weights.
        relative_gap: HiGHS is not started, or stops, once cost and bound are this close.
        nodes: limit of the search, in nodes rather than seconds, so that a busy machine finds the same ranks. Models of
            210 matrices are within 1e-4 of their bound after 20; 10,000 change the seventh digit of the cost, and take
            up to 30 seconds.

    Raises:
        InfeasibleBudgetError: even the lightest options do not fit.
    """
    first = relax(units, budget)
    kept = _worth_trying(units, first)
    # Sums of weights that options worth trying can have differ by multiples of the divisor. A solution of other options
    # costs more than the first one, so a bound for the largest sum within the budget holds for all.
    steps = [int(unit.weights[j]) - int(unit.weights[js[0]]) for unit, js in zip(units, kept, strict=True) for j in js]
    divisor = math.gcd(*steps)
    out_of_reach = (budget - first.weight) % divisor if divisor else budget - first.weight
    first = replace(first, bound=min(first.bound + first.multiplier * out_of_reach, first.cost))
    return first if first.gap <= relative_gap else _search(units, first, kept, budget, relative_gap, nodes)


def relax(units: Sequence[Options], budget: int) -> Solution:
    """The linear relaxation rounded down and filled up, with the Lagrangian bound; no integer search.

    The bound needs the lower hulls alone. It also holds for units that are sums of units and offer only the hull of
    their combinations (:func:`merged`); the bound of an integer search would not.

    Raises:
        InfeasibleBudgetError: even the lightest options do not fit.
    """
    choices, steps = _hulls(units)
    least = sum(int(unit.weights[c]) for unit, c in zip(units, choices, strict=True))
    if least > budget:
        raise InfeasibleBudgetError(
            f"a budget of {budget} parameters is below the least possible {least}; raise size_ratio", least
        )
    multiplier, left = 0.0, budget - least
    for rate, u, i, j in steps:
        step = int(units[u].weights[j] - units[u].weights[i])
        if step > left:
            multiplier = -rate
            break
        choices[u] = j
        left -= step
    # Lagrange: at any multiplier, no solution costs less than the options do that are best by cost and weighted price.
    bound = float(sum((u.costs + multiplier * u.weights).min() for u in units) - multiplier * budget)
    return _solution(units, _fill(units, choices, budget), bound, multiplier)


def merged(units: Sequence[Options]) -> tuple[Options, NDArray[np.int64]]:
    """Several units as one: the lower hull of all combinations, and which option of each unit (columns) a row takes.

    The hull of a sum is the sum of the hulls, walked in the order of falling cost per parameter. A single unit keeps
    all of its options.
    """
    if len(units) == 1:
        return units[0], np.arange(len(units[0].weights))[:, None]
    lightest, steps = _hulls(units)
    picks = np.empty((len(steps) + 1, len(units)), dtype=np.int64)
    picks[0] = lightest
    for row, (_, u, _, j) in enumerate(steps, start=1):
        picks[row] = picks[row - 1]
        picks[row, u] = j
    weights = np.sum([u.weights[picks[:, c]] for c, u in enumerate(units)], axis=0)
    costs = np.sum([u.costs[picks[:, c]] for c, u in enumerate(units)], axis=0)
    return Options(weights, costs), picks


def _hulls(units: Sequence[Options]) -> tuple[list[int], list[tuple[float, int, int, int]]]:
    """The lightest option of each hull, and the steps along all hulls: (-cost saved per parameter, unit, from, to)."""
    hulls = [_lower_hull(unit) for unit in units]
    steps = [
        (-_slope(units[u].weights, units[u].costs, i, j), u, i, j)
        for u, hull in enumerate(hulls)
        for i, j in pairwise(hull)
    ]
    return [hull[0] for hull in hulls], sorted(steps)


def _lower_hull(unit: Options) -> list[int]:
    """Options on the lower convex hull, by weight; along it the cost falls, at ever smaller rates."""
    order = np.lexsort((unit.costs, unit.weights))
    cheapest = np.minimum.accumulate(unit.costs[order])
    order = order[np.append(True, unit.costs[order][1:] < cheapest[:-1])]  # what a lighter one beats is on no hull
    weights, costs = unit.weights.tolist(), unit.costs.tolist()  # the loop reads Python's numbers far faster
    hull: list[int] = []
    for j in order.tolist():
        while len(hull) > 1 and _slope(weights, costs, hull[-1], j) >= _slope(weights, costs, hull[-2], hull[-1]):
            hull.pop()
        if hull and weights[j] == weights[hull[-1]]:
            hull.pop()
        hull.append(j)
    return hull


def _slope(weights: Any, costs: Any, i: int, j: int) -> float:
    """Cost saved per parameter from option i to the heavier option j."""
    weight = weights[j] - weights[i]
    return float((costs[i] - costs[j]) / weight) if weight else np.inf


def _fill(units: Sequence[Options], choices: list[int], budget: int) -> list[int]:
    """Spend the rest: the unit and option that save most among all that fit, until none does."""
    choices = list(choices)
    left = budget - sum(int(u.weights[c]) for u, c in zip(units, choices, strict=True))
    while True:
        best_saving, best = 0.0, None
        for u, unit in enumerate(units):
            fits = unit.weights <= unit.weights[choices[u]] + left
            j = int(np.argmin(np.where(fits, unit.costs, np.inf)))
            saving = float(unit.costs[choices[u]] - unit.costs[j])
            if saving > best_saving:
                best_saving, best = saving, (u, j)
        if best is None:
            return choices
        u, j = best
        left -= int(units[u].weights[j] - units[u].weights[choices[u]])
        choices[u] = j


def _solution(units: Sequence[Options], choices: list[int], bound: float, multiplier: float) -> Solution:
    weight = sum(int(u.weights[c]) for u, c in zip(units, choices, strict=True))
    cost = float(sum(u.costs[c] for u, c in zip(units, choices, strict=True)))
    return Solution(choices, weight, cost, min(bound, cost), multiplier)


def _worth_trying(units: Sequence[Options], first: Solution) -> list[list[int]]:
    """Options of each unit with a reduced cost below the gap of the first solution, and that solution's own."""
    gap = (first.cost - first.bound) * (1 + 1e-9)
    kept = []
    for unit, choice in zip(units, first.choices, strict=True):
        reduced = unit.costs + first.multiplier * unit.weights
        kept.append(sorted({*np.flatnonzero(reduced - reduced.min() <= gap).tolist(), choice}))
    return kept


def _search(
    units: Sequence[Options], first: Solution, options: list[list[int]], budget: int, relative_gap: float, nodes: int
) -> Solution:
    """HiGHS over some options of each unit, the first solution's among them."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, which reading params.yaml need not take
    from scipy.sparse import csr_array

    kept = [(u, j) for u, js in enumerate(options) for j in js]
    costs = np.array([units[u].costs[j] for u, j in kept])
    weights = np.array([units[u].weights[j] for u, j in kept], dtype=float)
    one_each = csr_array((np.ones(len(kept)), ([u for u, _ in kept], range(len(kept)))), shape=(len(units), len(kept)))
    scale = max(abs(first.cost), np.finfo(float).tiny)
    result = milp(
        costs / scale,
        integrality=np.ones(len(kept), dtype=int),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(weights[None] / budget, ub=1), LinearConstraint(one_each, 1, 1)],
        options={"mip_rel_gap": relative_gap, "node_limit": nodes, "presolve": False},  # it costs more than it saves
    )
    bound = first.bound if result.mip_dual_bound is None else max(first.bound, result.mip_dual_bound * scale)
    choices = list(first.choices)
    for i in [] if result.x is None else np.flatnonzero(result.x > 0.5):
        u, j = kept[i]
        choices[u] = j
    first = replace(first, bound=min(bound, first.cost))
    if sum(int(unit.weights[c]) for unit, c in zip(units, choices, strict=True)) > budget:
        return first  # HiGHS holds constraints to 1e-6 only
    found = _solution(units, _fill(units, choices, budget), bound, first.multiplier)  # it may stop with budget to spare
    return found if found.cost <= first.cost else first
