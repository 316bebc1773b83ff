"""ASVD's threshold against every threshold there is, its stable-rank guess by hand, invariants, errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.method.allocation.asvd import sensitivity, stable_rank_scores
from drank.method.allocation.knapsack import InfeasibleBudgetError
from drank.method.allocation.units import Menu, Unit

RATIOS = (0.3, 0.5, 0.7, 0.9)


def unit(name, shape=(10, 15), energies=None):
    energies = np.ones(min(shape)) if energies is None else np.array(energies, dtype=float)
    return Unit(name, "up_proj", "up", 0, *shape, energies=energies, effective_rank=1.0)


def test_the_least_sensitive_unit_is_cut_first_and_the_threshold_is_the_objective():
    units = [unit("robust"), unit("fragile")]
    scores = {"robust": {0.5: 6.0, 0.9: 5.1}, "fragile": {0.5: 9.0, 0.9: 7.0}}
    got = sensitivity(units, 0.75, scores)
    # 300 parameters in all, 225 of them allowed: robust at 0.5 has rank 3 and costs 75, fragile stays at 150.
    assert (got.choices["robust"].rank, got.choices["robust"].price) == (3, 75)
    assert (got.choices["fragile"].form, got.choices["fragile"].price) == ("dense", 150)
    assert (got.objective, got.bound, got.price, got.budget) == (6.0, 6.0, 225, 225)
    tighter = sensitivity(units, 0.74, scores)
    assert (tighter.objective, tighter.choices["fragile"].rank) == (7.0, 5)  # 5 * 25 = 125 <= 0.9 * 150
    whole = sensitivity(units, 1.0, {})
    assert ({c.form for c in whole.choices.values()}, whole.objective, whole.kept_ratio) == ({"dense"}, 0.0, 1.0)


# Measured perplexities are noisy: they need not fall with the ratio, and several may be equal.
scores_of_one = st.floats(1, 50) | st.sampled_from([5.0, 6.0])
grids = st.lists(st.lists(scores_of_one, min_size=len(RATIOS), max_size=len(RATIOS)), min_size=1, max_size=4)
SHAPES = [(10, 15), (20, 20), (6, 30), (1, 7)]  # no rank makes the last one smaller


def case(rows):
    units = [unit(f"u{i}", SHAPES[i]) for i in range(len(rows))]
    return units, {u.name: dict(zip(RATIOS, row, strict=True)) for u, row in zip(units, rows, strict=True)}


def by_hand(units, scores, threshold, menu):
    """Every unit's price under a threshold, from the definition."""
    prices = {}
    for u in units:
        borne = [r for r, score in scores[u.name].items() if score <= threshold and menu.rank_at(u, r) is not None]
        prices[u.name] = int(menu.price(u, menu.rank_at(u, min(borne)))) if borne else u.dense_price
    return prices


@given(grids, st.floats(0.2, 0.99), st.sampled_from(["factors", "pivot"]))
@settings(max_examples=60)
def test_the_threshold_is_the_least_of_all_that_fit(rows, size_ratio, storage):
    units, scores, menu = *case(rows), Menu(storage)
    budget = int(size_ratio * sum(u.dense_price for u in units) + 1e-6)
    fitting = [
        t
        for t in {score for row in scores.values() for score in row.values()}
        if sum(by_hand(units, scores, t, menu).values()) <= budget
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudgetError, match="raise size_ratio to"):
            sensitivity(units, size_ratio, scores, menu)
        return
    got = sensitivity(units, size_ratio, scores, menu)
    assert got.objective == got.bound
    assert {name: c.price for name, c in got.choices.items()} == by_hand(units, scores, got.objective, menu)
    assert by_hand(units, scores, got.objective, menu) == by_hand(units, scores, min(fitting), menu)
    assert got.price <= got.budget == budget


def test_ratios_without_a_rank_and_ratios_of_one_are_passed_by():
    menu = Menu(multiple_of=4)  # rank 4 costs 100 of 150
    got = sensitivity([unit("a")], 0.8, {"a": {0.3: 1.0, 0.7: 6.0, 1.0: 0.5, 1.4: 0.1}}, menu)
    assert (got.choices["a"].rank, got.objective) == (4, 6.0)


def test_stable_rank_scores_by_hand():
    units = [
        unit("a", (3, 3), [4.0, 1.0, 1.0]),
        unit("flat", (4, 5)),
        unit("one", (4, 5), [3.0]),
        unit("0", (4, 5), [0.0]),
    ]
    scores = stable_rank_scores(units, [0.5, 0.9])
    assert scores["a"][0.5] == pytest.approx(-math.sqrt(6 / 4) * 0.5**0.1)
    assert scores["flat"][0.9] == pytest.approx(-2 * 0.9**0.1)
    assert scores["one"][0.9] == scores["0"][0.9] == pytest.approx(-(0.9**0.1))
    assert scores["a"][0.5] > scores["a"][0.9]  # a smaller share is worse
    for ratio in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            stable_rank_scores(units, [ratio])


def test_units_of_high_stable_rank_are_cut_first_and_scale_does_not_matter():
    flat, steep = unit("flat"), unit("steep", energies=np.geomspace(1, 1e-9, 10))
    got = sensitivity([flat, steep], 0.8, stable_rank_scores([flat, steep], RATIOS))
    assert (got.choices["flat"].form, got.choices["steep"].form) == ("factors", "dense")
    scaled = unit("flat", energies=np.full(10, 7.0))
    assert stable_rank_scores([scaled], RATIOS)["flat"] == pytest.approx(stable_rank_scores([flat], RATIOS)["flat"])


@pytest.mark.parametrize(
    ("scores", "size_ratio", "menu", "error", "message"),
    [
        ({}, 0.8, Menu(), ValueError, "a: has no scores .* measure the same targets"),
        ({"a": {0.5: math.nan}}, 0.8, Menu(), ValueError, "score at ratio 0.5 is NaN"),
        ({"a": {0.5: 2.0}}, 0.8, Menu(dense=False), ValueError, "menu.dense is False"),
        ({"a": {0.5: 2.0}}, 0.4, Menu(), InfeasibleBudgetError, "keep 75 of 150 .* raise size_ratio to 0.5000"),
        ({"a": {}}, 0.4, Menu(), InfeasibleBudgetError, "keep 150 of 150"),
        ({"a": {0.5: 2.0}}, 0.8, Menu(multiple_of=16), InfeasibleBudgetError, "keep 150 of 150"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(scores, size_ratio, menu, error, message):
    with pytest.raises(error, match=message):
        sensitivity([unit("a")], size_ratio, scores, menu)
