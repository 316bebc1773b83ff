r"""The integer program under every allocation: one option a unit, least total cost within a budget.

.. math:: \min \sum_u c_u(j_u) \quad\text{s.t.}\quad \sum_u w_u(j_u) \le B

a multiple-choice knapsack with option costs c (any unit, the same in all units of the model) and integer weights w
(parameters). Numbers only: no tensors, no models.

The lower convex hull of each unit's (weight, cost) points gives the linear relaxation exactly, and with it a bound: no
solution costs less. The relaxation, rounded down and filled up, gives a first solution, which only options with a
reduced cost below the gap can still beat. Where the weights of those have a common divisor, as ranks of matrices of one
shape have, the part of the budget that no choice can reach is taken off the bound. If a gap is left, SciPy's HiGHS
searches, over these options alone, so the integer program is small however many ranks there are.

Reference: Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), ch. 11.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


class InfeasibleBudgetError(ValueError):
    """The cheapest choice of every unit costs more than the budget; the message names the nearest feasible value."""


@dataclass(frozen=True)
class Options:
    """What one unit offers: option j weighs weights[j] parameters and costs costs[j]."""

    weights: NDArray[np.int64]
    costs: NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """choices[u] indexes the options of unit u; bound <= optimum <= cost, and gap = (cost - bound) / |cost|."""

    choices: list[int]
    weight: int
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        return max(0.0, self.cost - self.bound) / abs(self.cost) if self.cost else 0.0


def solve(units: Sequence[Options], budget: int, *, relative_gap: float = 1e-4, nodes: int = 20) -> Solution:
    """Least-cost choice of one option a unit within the budget, with a certified bound.

    Args:
        units: what each unit offers; any order of options.
        budget: in parameters.
        relative_gap: HiGHS is not started, or stops, once cost and bound are this close.
        nodes: limit of the search, in nodes rather than seconds, so that a busy machine finds the same ranks; what the
            search then has is returned with its honest bound. Models of 210 matrices are within 1e-4 of their bound
            after 20; 10,000 change the seventh digit of the cost, and take up to 30 seconds.

    Raises:
        InfeasibleBudgetError: even the lightest options do not fit.
    """
    solution, multiplier = _relaxed(units, budget)
    kept = _worth_trying(units, solution, multiplier)
    solution = _within_reach(units, solution, kept, multiplier, budget)
    if solution.gap <= relative_gap:
        return solution
    return _search(units, solution, kept, budget, relative_gap, nodes)


def relax(units: Sequence[Options], budget: int) -> Solution:
    """The linear relaxation rounded down and filled up, with the Lagrangian bound; no integer search.

    The bound needs the lower hulls alone. It therefore also holds for units that are themselves sums of units and offer
    only the hull of their combinations (:func:`merged`), where that of an integer search would not.

    Raises:
        InfeasibleBudgetError: even the lightest options do not fit.
    """
    return _relaxed(units, budget)[0]


def merged(units: Sequence[Options]) -> tuple[Options, NDArray[np.int64]]:
    """Several units as one: the lower hull of all combinations, and which option of each unit (columns) a row takes.

    The hull of a sum is the sum of the hulls, walked in the order of falling cost a parameter.
    """
    hulls = [_lower_hull(u) for u in units]
    steps = sorted((-_rate(units[u], i, j), u, j) for u, hull in enumerate(hulls) for i, j in pairwise(hull))
    picks = np.empty((len(steps) + 1, len(units)), dtype=np.int64)
    picks[0] = [hull[0] for hull in hulls]
    for row, (_, u, j) in enumerate(steps, start=1):
        picks[row] = picks[row - 1]
        picks[row, u] = j
    weights = np.sum([u.weights[picks[:, c]] for c, u in enumerate(units)], axis=0)
    costs = np.sum([u.costs[picks[:, c]] for c, u in enumerate(units)], axis=0)
    return Options(weights, costs), picks


def _relaxed(units: Sequence[Options], budget: int) -> tuple[Solution, float]:
    """First solution and the multiplier of the relaxation."""
    lightest = sum(int(u.weights.min()) for u in units)
    if lightest > budget:
        raise InfeasibleBudgetError(
            f"a budget of {budget} parameters is below the least possible {lightest}; raise size_ratio"
        )
    choices, multiplier = _rounded_down(units, [_lower_hull(u) for u in units], budget)
    choices = _fill(units, choices, budget)
    return _solution(units, choices, _dual(units, multiplier, budget)), multiplier


def _lower_hull(unit: Options) -> list[int]:
    """Options on the lower convex hull, by weight; along it the cost falls, at ever smaller rates."""
    weights, costs = unit.weights.tolist(), unit.costs.tolist()  # numbers of Python, which this loop reads far faster
    hull: list[int] = []
    for j in np.lexsort((unit.costs, unit.weights)).tolist():
        if hull and costs[j] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(weights, costs, hull[-1], j) >= _slope(weights, costs, hull[-2], hull[-1]):
            hull.pop()
        if hull and weights[j] == weights[hull[-1]]:
            hull.pop()
        hull.append(j)
    return hull


def _slope(weights: list[int], costs: list[float], i: int, j: int) -> float:
    weight = weights[j] - weights[i]
    return (costs[i] - costs[j]) / weight if weight else np.inf


def _rate(unit: Options, i: int, j: int) -> float:
    """Cost saved a parameter from option i to the heavier option j."""
    weight = unit.weights[j] - unit.weights[i]
    return float((unit.costs[i] - unit.costs[j]) / weight) if weight else np.inf


def _rounded_down(units: Sequence[Options], hulls: list[list[int]], budget: int) -> tuple[list[int], float]:
    """Optimum of the linear relaxation, rounded down, and its multiplier: cost a parameter where the budget ran out."""
    steps = sorted((-_rate(units[u], i, j), u, i, j) for u, hull in enumerate(hulls) for i, j in pairwise(hull))
    choices = [hull[0] for hull in hulls]
    left = budget - sum(int(unit.weights[c]) for unit, c in zip(units, choices, strict=True))
    for rate, u, i, j in steps:
        step = int(units[u].weights[j] - units[u].weights[i])
        if step > left:
            return choices, -rate
        choices[u] = j
        left -= step
    return choices, 0.0


def _fill(units: Sequence[Options], choices: list[int], budget: int) -> list[int]:
    """Spend what is left: the unit and option that save most among all that fit, until none does."""
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


def _dual(units: Sequence[Options], multiplier: float, budget: int) -> float:
    """Lagrangian bound: min over options of cost + multiplier * weight, summed, less multiplier * budget."""
    return float(sum((u.costs + multiplier * u.weights).min() for u in units) - multiplier * budget)


def _solution(units: Sequence[Options], choices: list[int], bound: float) -> Solution:
    weight = sum(int(u.weights[c]) for u, c in zip(units, choices, strict=True))
    cost = float(sum(u.costs[c] for u, c in zip(units, choices, strict=True)))
    return Solution(choices, weight, cost, min(bound, cost))


def _worth_trying(units: Sequence[Options], first: Solution, multiplier: float) -> list[list[int]]:
    """Options of each unit whose reduced cost is below the gap of the first solution, and that solution's own."""
    gap = (first.cost - first.bound) * (1 + 1e-9)
    kept = []
    for unit, choice in zip(units, first.choices, strict=True):
        reduced = unit.costs + multiplier * unit.weights
        kept.append(sorted({*np.flatnonzero(reduced - reduced.min() <= gap).tolist(), choice}))
    return kept


def _within_reach(
    units: Sequence[Options], first: Solution, kept: list[list[int]], multiplier: float, budget: int
) -> Solution:
    """The same solution with a bound for the largest weight within the budget that options worth trying can have.

    A solution of other options costs more than the first one, so the bound holds for all.
    """
    steps = [int(unit.weights[j]) - int(unit.weights[js[0]]) for unit, js in zip(units, kept, strict=True) for j in js]
    divisor = math.gcd(*steps)
    out_of_reach = (budget - first.weight) % divisor if divisor else budget - first.weight
    return replace(first, bound=min(first.bound + multiplier * out_of_reach, first.cost))


def _search(
    units: Sequence[Options],
    first: Solution,
    options: list[list[int]],
    budget: int,
    relative_gap: float,
    nodes: int,
) -> Solution:
    """HiGHS over some options of each unit, those of the first solution among them."""
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
        options={
            "mip_rel_gap": relative_gap,
            "node_limit": nodes,
            "presolve": False,
        },  # which takes longer than it saves
    )
    bound = first.bound if result.mip_dual_bound is None else max(first.bound, result.mip_dual_bound * scale)
    if result.x is None:
        return _solution(units, first.choices, bound)
    choices = list(first.choices)
    for (u, j), taken in zip(kept, result.x, strict=True):
        if taken > 0.5:
            choices[u] = j
    if _solution(units, choices, bound).weight > budget:  # HiGHS holds constraints to 1e-6 only
        return _solution(units, first.choices, bound)
    found = _solution(units, _fill(units, choices, budget), bound)  # at its gap HiGHS stops with budget to spare
    return found if found.cost <= first.cost else _solution(units, first.choices, bound)
