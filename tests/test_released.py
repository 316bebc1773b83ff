"""The released D-Rank code's ranks: each rule by hand, the literature's arithmetic, invariants, errors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.method.allocation.d_rank_code import released
from drank.method.allocation.knapsack import InfeasibleBudgetError
from drank.method.allocation.rules import uniform
from drank.method.allocation.units import Menu, Unit, dense_choice

ROLES = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip


def unit(layer, kind, R=1.0, shape=(8, 8), energies=None):
    energies = np.ones(min(shape)) if energies is None else np.array(energies, dtype=float)
    role = ROLES.get(kind, "query_key_value")
    return Unit(f"layers.{layer}.{kind}", kind, role, layer, *shape, energies=energies, effective_rank=R)


def ranks(allocation, kind):
    """Ranks of a kind, by layer."""
    return [choice.rank for name, choice in sorted(allocation.choices.items()) if name.endswith(kind)]


FLAT = [1.0] * 8
STEEP = [10.0] + [0.1] * 7
TWO = [10.0, 10.0] + [0.1] * 6


# Two 8 x 8 matrices of effective ranks 4 and 1 at one half: Eq. 7 says 2.67 and 1.33, rounded 3 and 1; uniform is 2.
@pytest.mark.parametrize(
    ("kind", "second", "expected"),
    [
        ("o_proj", STEEP, [3, 1]),  # Eq. 7 drops 5 + 0.7, uniform 6 + 0.6
        ("down_proj", STEEP, [3, 1]),
        ("o_proj", TWO, [2, 2]),  # Eq. 7 drops 5 + 10.6
        ("up_proj", TWO, [2, 2]),
        ("gate_proj", STEEP, [2, 2]),  # though Eq. 7 would drop less
        ("q_proj", TWO, [3, 1]),  # though it drops more
        ("k_proj", TWO, [3, 1]),
        ("v_proj", TWO, [3, 1]),
        ("c", STEEP, [3, 1]),  # a kind of unknown role goes by the test of energies
        ("c", TWO, [2, 2]),
    ],
)
def test_a_type_falls_back_to_uniform_ranks_as_the_code_does_and_the_paper_does_not_say(kind, second, expected):
    units = [unit(0, kind, 4.0, energies=FLAT), unit(1, kind, 1.0, energies=second)]
    assert ranks(released(units, 0.5, 0.2), kind) == expected


def test_steps_move_ranks_from_the_least_sensitive_unit_to_the_most():
    # 211 parameters at 32 a rank: Eq. 7 rounds to (3, 2, 1); then +a, -b (c has no rank to give), +a, -a, +a, -a.
    rows = [(9.0, FLAT), (4.0, FLAT), (1.0, STEEP)]
    units = [unit(i, "o_proj", R, (16, 16), energies) for i, (R, energies) in enumerate(rows)]
    assert ranks(released(units, 0.275, 0.0), "o_proj") == [4, 1, 1]


def test_steps_that_end_above_the_budget_are_taken_back():
    # 83 parameters: 2.6 each rounds to 3 and 3, 96 in all; -, +, -, + ends there again.
    units = [unit(0, "o_proj"), unit(1, "o_proj")]
    got = released(units, 0.65, 0.0)
    assert (ranks(got, "o_proj"), got.price, got.budget) == ([2, 3], 80, 83)


def attention(shapes, values=(96, 96), R=None):
    """Two layers; values says how many components each value matrix has, which caps its rank."""
    R = R or {}
    return [
        unit(
            layer, kind, R.get(kind, (4.0, 4.0))[layer], shapes[kind],
            np.ones(values[layer] if kind == "v_proj" else min(shapes[kind])),
        )
        for layer in (0, 1) for kind in ("q_proj", "k_proj", "v_proj")
    ]  # fmt: skip


MANY_HEADS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (96, 96))
GROUPED = {"q_proj": (96, 96), "k_proj": (32, 96), "v_proj": (32, 96)}


# 24 ranks each at one half; a quarter of those of four queries and keys makes a pool of 24.
@pytest.mark.parametrize(
    ("components", "keys", "queries", "values"),
    [
        ((96, 96), [18, 18], [18, 18], [36, 36]),
        ((30, 96), [18, 18], [18, 18], [30, 42]),  # what the first cannot take goes to the second
        ((30, 32), [21, 20], [21, 20], [30, 32]),  # 10 come back: 2.5 each
        ((24, 24), [24, 24], [24, 24], [24, 24]),
    ],
)
def test_values_take_ranks_up_to_their_cap_then_each_others_then_they_go_back(components, keys, queries, values):
    got = released(attention(MANY_HEADS, components), 0.5, 0.25)
    assert (ranks(got, "k_proj"), ranks(got, "q_proj"), ranks(got, "v_proj")) == (keys, queries, values)
    assert sum(sum(row) for row in (keys, queries, values)) == 6 * 24  # ranks of one price are conserved
    assert got.price == got.budget


def test_ranks_above_break_even_are_stored_dense_and_what_that_saves_is_not_spent():
    got = released(attention(MANY_HEADS), 0.5, 0.9)
    assert (ranks(got, "q_proj"), ranks(got, "k_proj")) == ([2, 2], [2, 2])  # 22 of 24 are given away
    for name in ("layers.0.v_proj", "layers.1.v_proj"):  # 24 + 44 ranks, and 48 already cost as much as the matrix
        assert got.choices[name] == dense_choice(unit(0, "v_proj", shape=(96, 96)), 4 / 96)
    assert got.budget - got.price == 2 * (68 * 192 - 96 * 96)


@pytest.mark.parametrize(("beta", "share"), [(0.2, 1.12), (0.3, 1.28), (0.4, 1.44)])
def test_waste_of_the_released_code_on_llama_7b(beta, share):
    """Value factors of 1.12, 1.28 and 1.44 times the matrix at 20 % compression; 64, 150 and 236 M over 32 layers."""
    units = [unit(0, kind, 9.0, (4096, 4096)) for kind in ("q_proj", "k_proj", "v_proj")]
    got = released(units, 0.8, beta)
    wasted = got.budget - got.price
    assert got.choices["layers.0.v_proj"].form == "dense"
    assert 1 + wasted / 4096**2 == pytest.approx(share, abs=0.005)
    assert 32 * wasted / 1e6 == pytest.approx({0.2: 64, 0.3: 150, 0.4: 236}[beta], rel=0.02)


@pytest.mark.parametrize(("n_layers", "rank", "a_matrix"), [(1, 655, 655), (2, 1092, 546)])
def test_uniform_ranks_of_stacked_grouped_heads_are_those_of_the_paper(n_layers, rank, a_matrix):
    """Why it does not stack keys and values of Llama-3: the rank that one matrix is left with falls."""
    u = unit(0, "gate_proj", 5.0, (n_layers * 1024, 4096))
    assert uniform([u], 0.8).choices[u.name].rank == released([u], 0.8, 0.3).choices[u.name].rank == rank
    assert rank // n_layers == a_matrix


def test_grouped_heads_exchange_parameters_and_queries_and_keys_stay_uniform():
    units = attention(GROUPED, (32, 32), R={"q_proj": (1.0, 16.0), "k_proj": (1.0, 16.0)})
    got = released(units, 0.5, 1 / 12)
    # Of 24 and 12 ranks, 2 and 1 are given: 2 * 192 + 128 parameters a layer, 4 ranks of a value at 128.
    assert (ranks(got, "q_proj"), ranks(got, "k_proj"), ranks(got, "v_proj")) == ([22, 22], [11, 11], [16, 16])
    assert got.price == got.budget


def test_grouped_values_follow_eq_7_only_by_the_test_of_energies():
    R = {"v_proj": (16.0, 1.0)}
    units = attention(GROUPED, (32, 32), R)
    assert ranks(released(units, 0.5, 0.0), "v_proj") == [12, 12]
    first, second = (i for i, u in enumerate(units) if u.kind == "v_proj")
    units[first] = unit(0, "v_proj", 16.0, (32, 96), np.ones(32))
    units[second] = unit(1, "v_proj", 1.0, (32, 96), np.geomspace(1, 1e-9, 32))
    assert ranks(released(units, 0.5, 0.0), "v_proj") == [19, 5]  # 24 * 4/5, 24 * 1/5
    # A pool of 1024 is 4 ranks each, and the budget of the second steps is then met exactly.
    assert ranks(released(units, 0.5, 1 / 12), "v_proj") == [23, 9]
    # At 0.51 the first steps end at (22, 2), the exchange makes that (26, 6), and second steps move two on for the sake
    # of 61 parameters that buy no rank: (28, 4), of which the first is stored dense.
    assert ranks(released(units, 0.51, 1 / 12), "v_proj") == [32, 4]


def test_factors_are_the_only_storage_so_one_is_not_dense_for_a_square_matrix_below_break_even():
    got = released([unit(0, "up_proj", shape=(8, 9))], 0.9, 0.0)
    assert (ranks(got, "up_proj"), got.price) == ([3], 51)  # 0.9 * 72 / 17 = 3.8; rank 4 costs 68 > 64


model = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries(
        {kind: st.lists(st.tuples(st.floats(1, 30), st.floats(0, 1)), min_size=n, max_size=n) for kind in ROLES}
    )
)
SHAPES = {"o_proj": (48, 48), "gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
HEADS = {
    "many": dict.fromkeys(("q_proj", "k_proj", "v_proj"), (48, 48)),
    "grouped": {"q_proj": (48, 48), "k_proj": (16, 48), "v_proj": (16, 48)},
}


def build(rows, heads):
    shapes = SHAPES | HEADS[heads]
    return [
        unit(layer, kind, R, shapes[kind], np.exp(-decay * np.arange(min(shapes[kind]))))
        for kind, values in rows.items()
        for layer, (R, decay) in enumerate(values)
    ]


@given(model, st.sampled_from(["many", "grouped"]), st.floats(0.2, 1.0), st.floats(0, 0.9))
def test_the_budget_is_never_exceeded_and_every_choice_is_storable(rows, heads, size_ratio, beta):
    units = build(rows, heads)
    got = released(units, size_ratio, beta)
    assert got.price <= got.budget
    assert got.bound <= got.objective
    assert got.objective == pytest.approx(sum(u.effective_rank / got.choices[u.name].rank for u in units), rel=1e-9)
    for u in units:
        choice = got.choices[u.name]
        assert 1 <= choice.rank <= u.full_rank
        if choice.form == "dense":
            assert (choice.rank, choice.price) == (u.full_rank, u.dense_price)
        else:
            assert choice.price == choice.rank * (u.out_features + u.in_features) < u.dense_price
    if size_ratio < 0.99:  # closer to 1, rounding decides whether a gate breaks even
        gates = [u for u in units if u.role == "gate"]
        even = uniform(gates, size_ratio)
        assert {u.name: got.choices[u.name].rank for u in gates} == {n: c.rank for n, c in even.choices.items()}


@given(model, st.sampled_from(["many", "grouped"]), st.floats(0.2, 1.0), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_order_of_units_and_scale_of_energies_do_not_matter(rows, heads, size_ratio, draw):
    units = build(rows, heads)
    shuffled = [replace(u, energies=u.energies * 4) for u in units]
    draw.shuffle(shuffled)
    assert released(shuffled, size_ratio, 0.3).choices == released(units, size_ratio, 0.3).choices


@pytest.mark.parametrize(
    ("menu", "size_ratio", "error", "message"),
    [
        (Menu("pivot"), 0.8, ValueError, "pivot.* leave the menu at its defaults"),
        (Menu(floor=0.1), 0.8, ValueError, "floor=0.1"),
        (Menu(multiple_of=8), 0.8, ValueError, "multiple_of=8"),
        (Menu(), 0.1, InfeasibleBudgetError, "size_ratio 0.1 leaves 12 .* least possible 32 .* 0.2500 or more"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(menu, size_ratio, error, message):
    with pytest.raises(error, match=message):
        released([unit(0, "up_proj"), unit(1, "up_proj")], size_ratio, 0.2, menu)
