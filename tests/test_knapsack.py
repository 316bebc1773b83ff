"""The integer program against brute force, its bound against SciPy's linear relaxation, and its limits."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from drank.method.allocation.knapsack import InfeasibleBudgetError, Options, merged, relax, solve

options = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 100, allow_subnormal=False)), min_size=1, max_size=5).map(
    lambda rows: Options(np.array([w for w, _ in rows]), np.array([c for _, c in rows]))
)


def brute_force(units, budget):
    picks = product(*(range(len(u.weights)) for u in units))
    costs = [
        sum(u.costs[j] for u, j in zip(units, pick, strict=True))
        for pick in picks
        if sum(u.weights[j] for u, j in zip(units, pick, strict=True)) <= budget
    ]
    return min(costs, default=None)


def relaxation(units, budget):
    rows = [(u, j) for u, unit in enumerate(units) for j in range(len(unit.weights))]
    result = linprog(
        [units[u].costs[j] for u, j in rows],
        A_ub=[[units[u].weights[j] for u, j in rows]],
        b_ub=[budget],
        A_eq=[[float(u == v) for u, _ in rows] for v in range(len(units))],
        b_eq=np.ones(len(units)),
        bounds=(0, 1),
    )
    return result.fun


@settings(max_examples=60)
@given(st.lists(options, min_size=1, max_size=4), st.integers(1, 80))
def test_the_optimum_equals_brute_force_and_the_relaxation_bounds_it(units, budget):
    expected = brute_force(units, budget)
    if expected is None:
        for search in (solve, relax):
            with pytest.raises(InfeasibleBudgetError, match="least possible") as refused:
                search(units, budget)
            assert refused.value.least == sum(min(unit.weights) for unit in units)
        return
    solution, rounded = solve(units, budget, relative_gap=1e-9), relax(units, budget)
    assert max(solution.weight, rounded.weight) <= budget
    assert solution.cost == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert relaxation(units, budget) - 1e-6 <= solution.bound <= solution.cost
    assert rounded.bound <= expected * (1 + 1e-9) + 1e-9
    assert expected <= rounded.cost * (1 + 1e-9) + 1e-9
    assert rounded.bound == pytest.approx(relaxation(units, budget), rel=1e-6, abs=1e-6)


@given(st.lists(options, min_size=1, max_size=3), st.floats(0, 50))
def test_merged_units_hold_the_best_combination_at_any_price_of_a_parameter(units, price):
    one, picks = merged(units)
    assert picks.shape == (len(one.weights), len(units))
    for row, (weight, cost) in enumerate(zip(one.weights, one.costs, strict=True)):
        assert weight == sum(u.weights[j] for u, j in zip(units, picks[row], strict=True))
        assert cost == pytest.approx(sum(u.costs[j] for u, j in zip(units, picks[row], strict=True)))
    best = sum(float((u.costs + price * u.weights).min()) for u in units)
    assert float((one.costs + price * one.weights).min()) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_equal_weights_are_solved_without_a_search(monkeypatch):
    # Ranks of matrices of one shape: the last multiple within the budget is reached, and rounding down is optimal.
    monkeypatch.setattr("scipy.optimize.milp", None)
    rng = np.random.default_rng(0)
    units = [Options(np.arange(1, 300) * 1152, rng.uniform(1, 300) / np.arange(1, 300)) for _ in range(30)]
    budget = 2000 * 1152 + 700
    found = solve(units, budget)
    assert found.weight == 2000 * 1152
    assert found.gap <= 1e-12
    assert relax(units, budget).gap > 1e-4


def test_a_budget_between_two_reachable_weights_is_bounded_by_the_lower_by_hand():
    # Weights 1, 4 and 7 within 6: the relaxation takes two thirds of the step from 4 to 7.
    unit = Options(np.array([1, 4, 7]), np.array([9.0, 3.0, 0.0]))
    assert relax([unit], 6).bound == 1.0
    found = solve([unit], 6)
    assert (found.choices, found.cost, found.bound) == ([1], 3.0, 3.0)


def test_what_the_search_leaves_is_spent():
    # The gap allows HiGHS to stop early; the last unit's cheap improvement fits the budget and must be taken.
    rng = np.random.default_rng(0)
    units = [Options(np.arange(1, 40), np.sort(rng.uniform(0, 1, 39))[::-1].copy()) for _ in range(12)]
    found = solve(units, 200, relative_gap=0.5)
    left = 200 - found.weight
    for unit, choice in zip(units, found.choices, strict=True):
        fits = unit.weights <= unit.weights[choice] + left
        assert unit.costs[fits].min() >= unit.costs[choice]
