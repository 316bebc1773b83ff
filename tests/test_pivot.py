"""Pivot form, of a matrix and of a stack: by hand, exact reconstruction over random shapes and ranks, coefficient
sizes, degenerate and bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drank.method.covariance import NotFiniteError
from drank.method.pivot import PivotForm, RankDeficientError, pivot_rows, split_group


def factors(n_out, n_in, k, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n_out, k, dtype=torch.float64, generator=generator)
    right = torch.randn(k, n_in, dtype=torch.float64, generator=generator)
    return left.to(dtype), right.to(dtype)


def rebuilt(form):
    dense = torch.full((len(form.order), form.kept.shape[1]), torch.nan, dtype=torch.float64)
    dense[form.order.long()] = torch.cat([form.kept, form.coefficients @ form.kept])
    return dense


@st.composite
def shapes(draw):
    n_out, n_in = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return n_out, n_in, draw(st.integers(1, min(n_out, n_in)))


def test_the_longest_row_is_kept_and_the_others_are_multiples_of_it():
    form = pivot_rows(torch.tensor([[1.0], [4.0], [-2.0]]), torch.tensor([[3.0, 5.0]]))
    assert form.kept.tolist() == [[12.0, 20.0]]
    assert form.coefficients.tolist() == [[0.25], [-0.5]]
    assert form.order.tolist() == [1, 0, 2]
    assert form.max_abs_coefficient == 0.5


@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_rows_are_those_of_discrete_empirical_interpolation_and_give_all_others(shape, seed):
    k = shape[2]
    left, right = factors(*shape, seed=seed)
    form, W = pivot_rows(left, right), left @ right
    assert (rebuilt(form) - W).abs().max() <= 1e-12 * W.abs().max()
    kept, rest = form.order.long().split([k, len(W) - k])
    oracle = torch.linalg.lstsq(W[kept].T, W[rest].T).solution.T
    torch.testing.assert_close(form.coefficients, oracle, rtol=1e-6, atol=1e-6)
    taken = []
    for i in range(k):  # each column's largest entry that the columns before it, interpolated at the rows taken, miss
        known = torch.linalg.solve(left[taken, :i], left[taken, i]) if taken else torch.zeros(0, dtype=torch.float64)
        taken.append(int((left[:, i] - left[:, :i] @ known).abs().argmax()))
    assert kept.tolist() == sorted(taken)


@pytest.mark.parametrize(("n_out", "n_in", "k"), [(192, 576, 120), (576, 576, 300), (300, 96, 60), (5, 8, 5)])
def test_coefficients_stay_near_one_where_rows_are_alike_and_are_reported(n_out, n_in, k):
    form = pivot_rows(*factors(n_out, n_in, k))
    assert form.max_abs_coefficient == (form.coefficients.abs().max() if k < n_out else 0)
    assert form.max_abs_coefficient < 5
    assert k < n_out or form.order.tolist() == list(range(n_out)), "a matrix of full rank is kept whole and in order"


@pytest.mark.parametrize(
    ("left", "error", "message"),
    [
        (torch.ones(4, 2), RankDeficientError, r"\(4, 2\) has only 1 independent columns: keep rank 1"),
        (torch.zeros(4, 2), RankDeficientError, "only 0 independent columns"),
        (torch.eye(3)[:2], RankDeficientError, r"\(2, 3\) has only 2 independent columns"),
        (torch.tensor([[1.0, torch.nan], [2.0, 1.0]]), NotFiniteError, "1 of 4 entries of the left factor"),
    ],
)
def test_bad_factors_are_refused(left, error, message):
    with pytest.raises(error, match=message):
        pivot_rows(left, torch.ones(left.shape[1], 5))


def rebuilt_members(form, out_sizes):
    members = []
    for first, coefficients, order in split_group(form, out_sizes):
        own = form.kept[first : first + len(order) - len(coefficients)]
        dense = torch.full((len(order), form.kept.shape[1]), torch.nan, dtype=torch.float64)
        dense[order.long()] = torch.cat([own, coefficients @ form.kept])
        members.append(dense)
    return members


@st.composite
def stacks(draw):
    out_sizes, n_in = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5)), draw(st.integers(1, 24))
    return out_sizes, n_in, draw(st.integers(1, min(sum(out_sizes), n_in)))


def test_two_members_by_hand():
    # Rows 1 and 3 of the stack are kept: row 1 of the first member (of 2 rows), row 1 of the second (of 3).
    form = PivotForm(
        kept=torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]], dtype=torch.float64),
        coefficients=torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, -1.0]], dtype=torch.float64),
        order=torch.tensor([1, 3, 0, 2, 4], dtype=torch.int32),
        max_abs_coefficient=3.0,
    )
    first, second = split_group(form, [2, 3])
    assert (first.first, first.coefficients.tolist(), first.order.tolist()) == (0, [[2.0, 1.0]], [1, 0])
    assert (second.first, second.coefficients.tolist()) == (1, [[0.0, 3.0], [1.0, -1.0]])
    assert second.order.tolist() == [1, 0, 2]
    upper, lower = rebuilt_members(form, [2, 3])
    assert upper.tolist() == [[2.0, 1.0, 7.0], [1.0, 0.0, 2.0]]
    assert lower.tolist() == [[0.0, 3.0, 9.0], [0.0, 1.0, 3.0], [1.0, -1.0, -1.0]]


@given(stack=stacks(), seed=st.integers(0, 10_000))
def test_members_are_the_blocks_of_the_stack_share_its_kept_rows_and_cost_what_the_formula_says(stack, seed):
    out_sizes, n_in, k = stack
    left, right = factors(sum(out_sizes), n_in, k, seed=seed)
    form, W = pivot_rows(left, right), left @ right
    for member, block in zip(rebuilt_members(form, out_sizes), W.split(out_sizes), strict=True):
        assert member.shape == block.shape
        assert (member - block).abs().max() <= 1e-12 * W.abs().max()
    members = split_group(form, out_sizes)
    own = [row for m in members for row in range(m.first, m.first + len(m.order) - len(m.coefficients))]
    assert own == list(range(k))
    assert [sorted(m.order.tolist()) for m in members] == [list(range(size)) for size in out_sizes]
    assert form.kept.numel() + sum(m.coefficients.numel() for m in members) == k * (sum(out_sizes) + n_in - k)


def test_a_member_may_keep_no_row_or_all_of_them():
    left, right = factors(4, 6, 4)
    none, every = split_group(pivot_rows(torch.cat([left / 100, left]), right), [4, 4])
    assert (none.first, none.coefficients.shape) == (0, (4, 4))
    assert (every.first, every.coefficients.shape, every.order.tolist()) == (0, (0, 4), [0, 1, 2, 3])


@pytest.mark.parametrize("out_sizes", [[5, 5], [], [9, 0], [12, -3], [9, 9]])
def test_sizes_that_are_not_those_of_the_stack_are_refused(out_sizes):
    form = pivot_rows(*factors(9, 7, 4))
    with pytest.raises(ValueError, match=r"out_sizes \[.*\] must be positive and add up to the 9 rows of the stack"):
        split_group(form, out_sizes)
