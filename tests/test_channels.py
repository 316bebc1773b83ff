"""Channels removed: hand-computed, against least squares and brute force, exact losses, bad input."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drank.method.channels import remove_channels, row_grams
from drank.method.metrics import damped


def problem(seed, n_out=5, n=8):
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(n_out, n, generator=draw, dtype=torch.float64)
    x, g = (torch.randn(4 * d, d, generator=draw, dtype=torch.float64) for d in (n, n_out))
    return down, x.T @ x / len(x), g.T @ g / len(g)


def cost(D, H, G):
    return float(((G @ D @ H) * D).sum())


def refit(down, H, alive):
    """Least squares: the columns of W H^½ in the span of the channels kept."""
    root = torch.linalg.cholesky(H)
    return torch.linalg.lstsq(root[alive].T, (down @ root).T).solution.T


def test_by_hand_two_equal_channels_become_one_of_twice_the_weight():
    # Both channels carry the same signal up to 1 %, so removing the lighter one doubles what the other says.
    H = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    down = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    _, cut = remove_channels(down, H, torch.eye(1), [2, 1])
    assert cut.alive.tolist() == [1]
    assert cut.down.item() == pytest.approx(2 + 0.99)
    assert cut.loss == pytest.approx(1 - 0.99**2)
    # Without correlation they cost their energy, and nothing is corrected.
    down, H = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0, 1.0]))
    (cut,) = remove_channels(down, H, torch.eye(1) * 2, [1])
    assert (cut.alive.tolist(), cut.down.item()) == ([0], pytest.approx(3))
    assert cut.loss == pytest.approx(2 * (1 * 4 + 4 * 1))


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_every_cut_is_the_least_squares_refit_and_its_loss_is_the_error_in_the_metric(seed, at_once):
    down, H, G = problem(seed)
    cuts = remove_channels(down, H, G, [8, 5, 3], at_once)
    assert [len(cut.alive) for cut in cuts] == [8, 5, 3]
    for cut in cuts:
        torch.testing.assert_close(cut.down, refit(down, H, cut.alive), rtol=1e-6, atol=1e-8)
        error = down.clone()
        error[:, cut.alive] -= cut.down
        assert cut.loss == pytest.approx(cost(error, H, G), rel=1e-6, abs=1e-10)
    assert [cut.loss for cut in cuts] == sorted(cut.loss for cut in cuts)
    assert set(cuts[2].alive.tolist()) < set(cuts[1].alive.tolist())
    (first,) = remove_channels(down, H, G, [7])
    every = []
    for kept in map(torch.tensor, combinations(range(8), 7)):
        error = down.clone()
        error[:, kept] -= refit(down, H, kept)
        every.append(cost(error, H, G))
    assert first.loss == pytest.approx(min(every), rel=1e-6), "the first channel removed is the best one of all"


def test_singular_inputs_need_damping_and_a_dead_channel_goes_first():
    down, H, G = problem(1)
    H[3], H[:, 3] = 0, 0
    with pytest.raises(torch.linalg.LinAlgError):
        remove_channels(down, H, G, [7])
    (cut,) = remove_channels(down, damped(H, 1e-6), G, [7])
    assert 3 not in cut.alive
    assert cut.loss < 1e-4 * cost(down, H, G)


@pytest.mark.parametrize("kept", [[0], [9], [3, 5], [4, 4]])
def test_numbers_of_channels_that_cannot_be_are_refused(kept):
    with pytest.raises(ValueError, match="channels kept must fall from at most 8 to at least 1"):
        remove_channels(*problem(0), kept)


def test_products_of_what_is_left_follow_from_those_before():
    W, H, G = problem(0, n_out=8, n=12)
    for cut in remove_channels(W, H, G, [12, 9, 4], at_once=2):
        direct = cut.down @ H[cut.alive][:, cut.alive] @ cut.down.T
        torch.testing.assert_close(cut.gram, direct)
    kept = [torch.arange(12), torch.tensor([0, 2, 3, 5, 8, 11]), torch.tensor([2, 11])]
    rows = W.T
    for alive, gram in zip(kept, row_grams(rows, H, kept), strict=True):
        torch.testing.assert_close(gram, rows[alive].T @ H[alive][:, alive] @ rows[alive])
