"""The streamed second moment against the one-shot product, by hand, and on bad activations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.method.covariance import NotFiniteError, SecondMoment, clipped


def test_two_rows_by_hand():
    moment = SecondMoment(2)
    moment.add(torch.tensor([[1.0, -2.0], [-3.0, 0.0]]))
    assert moment.mean().tolist() == [[5.0, -1.0], [-1.0, 2.0]]
    assert moment.mean_magnitude().tolist() == [2.0, 1.0]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 99))
def test_streaming_equals_one_shot_whatever_the_batching(batches, size, seed):
    x = torch.randn(sum(batches), size, generator=torch.Generator().manual_seed(seed))
    moment = SecondMoment(size)
    for part in x.split(batches):
        moment.add(part)
    torch.testing.assert_close(moment.mean().double(), x.double().T @ x.double() / len(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("units", [False, True])
def test_many_batches_of_a_wide_input_stay_within_the_bound_of_the_docstring(generator, units):
    batches, tokens, size = 200, 16, 600  # wider than a panel, and no multiple of it
    moment, exact, absolute = SecondMoment(size, bfloat16_units=units), torch.zeros(size, size, dtype=torch.float64), 0
    for _ in range(batches):
        x = torch.randn(tokens, size, generator=generator).bfloat16()
        x[:, 0] *= 1e4  # a channel of massive activations must not drown the others
        moment.add(x)
        exact += x.double().T @ x.double()
        absolute += x.double().abs().T @ x.double().abs()
    error = (moment.mean() * batches * tokens - exact).abs() / absolute
    assert error.max() < (tokens + batches) * torch.finfo(torch.float32).eps
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_activations_that_are_not_finite_are_refused(bad):
    moment = SecondMoment(3)
    moment.add(torch.tensor([[0.0, bad, 1.0]]))
    with pytest.raises(NotFiniteError, match="channels hold NaN or infinity"):
        moment.mean()
    with pytest.raises(ValueError, match="no token was seen"):
        SecondMoment(3).mean()


def test_gradients_are_clipped_to_their_windows_mean_norm_by_hand():
    """The second window is a hundred times the first: each has its own mean, 4, of the tokens that are not zero."""
    norms = torch.tensor([9.0, 1.0, 10.0, 0.0, 1.0, 9.0])
    window = norms[:, None] * torch.tensor([0.6, -0.8])
    rows = clipped(torch.stack([window, 100 * window]), 0.5, 2.0, 0.2)
    wanted = torch.tensor([2.0, 8.0, 0.0, 2.0])
    torch.testing.assert_close(rows.norm(dim=1), torch.cat([wanted, 100 * wanted]))
    torch.testing.assert_close(rows[1], 8 * torch.tensor([0.6, -0.8]))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.floats(0, 0.49), st.integers(0, 99))
def test_wide_bounds_leave_gradients_as_they_are_and_equal_ones_make_norms_equal(windows, tokens, margin, seed):
    g = torch.randn(windows, tokens, 3, generator=torch.Generator().manual_seed(seed))
    cut = int(margin * tokens)
    middle = g[:, cut : tokens - cut]
    torch.testing.assert_close(clipped(g, 0.0, 1e9, margin), middle.flatten(0, 1))
    norms = clipped(g, 1.0, 1.0, margin).norm(dim=1).unflatten(0, (windows, -1))
    torch.testing.assert_close(norms, middle.norm(dim=2).mean(1, keepdim=True).expand_as(norms))
