"""Pivot form: by hand, exact reconstruction over random shapes and ranks, coefficient sizes, degenerate and bad
input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.covariance import NotFiniteError
from drank.pivot import RankDeficientError, pivot_rows


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


@settings(deadline=None)
@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_every_row_is_rebuilt_in_its_place(shape, seed):
    left, right = factors(*shape, seed=seed)
    form = pivot_rows(left, right)
    W = left @ right
    assert (rebuilt(form) - W).abs().max() <= 1e-12 * W.abs().max()


@settings(deadline=None)
@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_kept_rows_are_rows_of_the_matrix_itself_and_the_order_is_a_permutation(shape, seed):
    n_out, n_in, k = shape
    left, right = factors(n_out, n_in, k, seed=seed)
    form = pivot_rows(left, right)
    assert sorted(form.order.tolist()) == list(range(n_out))
    assert form.kept.shape == (k, n_in)
    assert form.coefficients.shape == (n_out - k, k)
    torch.testing.assert_close(form.kept, (left @ right)[form.order[:k].long()], rtol=1e-13, atol=1e-13)


@settings(deadline=None)
@given(shape=shapes(), seed=st.integers(0, 10_000))
def test_coefficients_depend_on_the_rows_kept_and_not_on_the_factorisation(shape, seed):
    left, right = factors(*shape, seed=seed)
    form = pivot_rows(left, right)
    kept, rest = form.order[: shape[2]].long(), form.order[shape[2] :].long()
    oracle = torch.linalg.lstsq((left @ right)[kept].T, (left @ right)[rest].T).solution.T
    torch.testing.assert_close(form.coefficients, oracle, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_out", "n_in", "k"), [(192, 576, 120), (576, 576, 300), (300, 96, 60)])
def test_coefficients_stay_near_one_where_rows_are_alike_and_are_reported(n_out, n_in, k):
    form = pivot_rows(*factors(n_out, n_in, k))
    assert form.max_abs_coefficient == form.coefficients.abs().max()
    assert form.max_abs_coefficient < 5


def test_float32_factors_are_rebuilt_as_float64_would_be():
    left, right = factors(40, 30, 12, dtype=torch.float32)
    torch.testing.assert_close(rebuilt(pivot_rows(left, right)), left.double() @ right.double(), rtol=1e-12, atol=1e-12)


def test_the_same_factors_give_the_same_bits():
    first, second = pivot_rows(*factors(50, 40, 20)), pivot_rows(*factors(50, 40, 20))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def test_a_full_rank_matrix_is_kept_whole_and_in_order():
    left, right = factors(5, 8, 5)
    form = pivot_rows(left, right)
    assert form.order.tolist() == [0, 1, 2, 3, 4]
    assert form.coefficients.shape == (0, 5)
    assert form.max_abs_coefficient == 0
    torch.testing.assert_close(form.kept, left @ right)


def test_duplicate_rows_are_kept_once():
    left, right = factors(4, 9, 3)
    form = pivot_rows(left.repeat(3, 1), right)
    kept = form.order[:3] % 4
    assert len(set(kept.tolist())) == 3
    torch.testing.assert_close(rebuilt(form), (left @ right).repeat(3, 1), rtol=1e-12, atol=1e-12)


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
