"""Rounding: a case by hand, brute force, GPTQ as its paper has it, invariants, degenerate input."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drank.method.covariance import NotFiniteError
from drank.method.precisions import Grid
from drank.method.rounding import (
    DAMPING,
    GRADIENT_DAMPING,
    expected_loss,
    feedback,
    grid_of,
    loss,
    nearest,
    refit,
    unit_upper,
)


def covariance(size, generator, n=None, correlated=True):
    x = torch.randn(n or 4 * size, size, generator=generator, dtype=torch.float64)
    if correlated:
        x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


def damped(H):
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def test_by_hand():
    """Steps of 1 from 0 to 3. Inputs 1 and 2 are nearly the same: what one loses, the other makes up for.

    U_12 = H_12 / H_22 = .99 / 1.03, so number 2 is rounded from .45 + .45 * .96 = .88.
    """
    W = torch.tensor([[0.0, 0.45, 0.45, 3.0]])
    H = torch.eye(4, dtype=torch.float64)
    H[1, 2] = H[2, 1] = 0.99
    grid = Grid(2, 4)
    assert nearest(W, grid).weight.tolist() == [[0, 0, 0, 3]]
    assert feedback(W, grid, H).weight.tolist() == [[0, 0, 1, 3]]
    assert loss(torch.tensor([[0, -0.45, 0.55, 0]]), H) == pytest.approx(
        0.5 * (0.45**2 + 0.55**2 - 2 * 0.99 * 0.45 * 0.55)
    )


def test_the_price_counts_integers_scales_and_zero_points():
    assert Grid(4, 64).bits_of(10, 128) == 10 * (128 * 4 + 2 * (16 + 4))
    assert Grid(4, 64, symmetric=True).bits_of(10, 130) == 10 * (130 * 4 + 3 * 16)
    assert Grid(3, 64).bits_of(10, 65) == 10 * 8 * (17 + 9 + 2 * 2 + 1 + 1)  # planes of 2 bits and of 1 end with a byte


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_neighbour_on_the_grid_is_closer_than_the_nearest(bits, symmetric, generator):
    W = torch.randn(6, 40, generator=generator)
    rounded = nearest(W, Grid(bits, 16, symmetric))
    assert int(rounded.codes.max()) < 2**bits
    for shift in (-1, 1):
        codes = (rounded.codes.int() + shift).clamp(0, 2**bits - 1).to(torch.uint8)
        other = replace(rounded, codes=codes)
        assert torch.all((other.weight - W).abs() >= (rounded.weight - W).abs() - 1e-6)


def test_with_independent_inputs_feedback_is_rounding_to_nearest(generator):
    W = torch.randn(7, 70, generator=generator)
    H = torch.diag(torch.rand(70, generator=generator, dtype=torch.float64) + 0.1)
    grid = Grid(3, 32)
    assert torch.equal(feedback(W, grid, H).codes, nearest(W, grid, H.diagonal()).codes)


def test_feedback_along_columns_is_gptq(generator):
    """Frantar et al. (arXiv:2210.17323), Algorithm 1 with blocks of one column: the inverse Hessian's Cholesky rows.

    Columns in the order of the Hessian's diagonal, which their code calls act-order, on grids of the first order.
    """
    W, H, grid = torch.randn(5, 150, generator=generator), covariance(150, generator), Grid(3, 32)
    found = feedback(W, grid, H).weight.double()
    scales, zeros = (t.double().repeat_interleave(32, 1)[:, :150] for t in grid_of(W, grid, H.diagonal()))
    order = H.diagonal().argsort(descending=True)
    W, H, found, scales, zeros = W[:, order], H[order][:, order], found[:, order], scales[:, order], zeros[:, order]
    left, expected = W.double().clone(), torch.empty(5, 150, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(H)), upper=True)
    for j in range(150):
        q = (left[:, j] / scales[:, j] + zeros[:, j]).round().clamp(0, 7)
        expected[:, j] = scales[:, j] * (q - zeros[:, j])
        error = (left[:, j] - expected[:, j]) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    assert (found != expected.float()).float().mean() < 0.01  # a tie that float32 breaks otherwise moves what follows
    assert loss(found - W, H) == pytest.approx(loss(expected - W, H), rel=0.01)


def test_brute_force_is_not_far_below(generator):
    """All 4^6 roundings of a row, in six correlated inputs."""
    grid, ratios = Grid(2, 6), []
    for _ in range(10):
        W, H = torch.randn(1, 6, generator=generator), covariance(6, generator)
        found = feedback(W, grid, H)
        every = torch.tensor(list(itertools.product(range(4), repeat=6)))
        weights = found.scales.float() * (every - found.zeros.float())
        E = (weights - W).double()
        best = float(0.5 * ((E @ H) * E).sum(1).min())
        ratios.append(loss(found.weight - W, H) / best)
    assert min(ratios) >= 1 - 1e-6
    assert sorted(ratios)[5] < 2


def test_feedback_of_rows_lowers_the_loss_in_both_metrics(generator):
    W = torch.randn(200, 60, generator=generator)
    H, G, grid = covariance(60, generator), covariance(200, generator), Grid(3, 20)
    along, both = feedback(W, grid, H), feedback(W, grid, H, G)
    assert torch.equal(along.codes[:64], both.codes[:64])  # nothing comes before the first rows
    assert loss(both.weight - W, H, G) < loss(along.weight - W, H, G)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_expected_loss_is_that_of_rounding(bits, generator):
    W, H, G = torch.randn(96, 128, generator=generator), covariance(128, generator), covariance(96, generator)
    grid = Grid(bits, 32)
    found = loss(feedback(W, grid, damped(H)).weight - W, damped(H), G)
    assert expected_loss(W, grid, damped(H), G) == pytest.approx(found, rel=0.2)


def test_a_refit_by_hand():
    """K has become (2, 0) for (1, 0), inputs are independent, so the second row (3, 5) keeps 3 = 1.5 * 2.

    Rows whose gradients are the same act alike: the second also makes up for the 1 that the first has too much.
    """
    W, K, H = torch.tensor([[1.0, 0.0], [3.0, 5.0]]), torch.tensor([[2.0, 0.0]]), torch.eye(2)
    assert refit(W, K, H, None, K).tolist() == [[pytest.approx(1.5)]]
    G = torch.ones(2, 2)  # damped: 1 / (1 + GRADIENT_DAMPING) of it is known
    assert refit(W, K, H, G, K).tolist() == [[pytest.approx((3 - 1 / (1 + GRADIENT_DAMPING)) / 2)]]


@pytest.mark.parametrize("n_fixed", [0, 4])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_refit_is_the_least_squares_solution(n_fixed, with_gradients, generator):
    """|G^½ (W - [F; C K]) H^½| over all C, solved as one system of its entries."""
    n_out, n_in, k = 9, 7, 4
    W, K = (torch.randn(n, n_in, generator=generator, dtype=torch.float64) for n in (n_out, k))
    F = torch.randn(n_fixed, n_in, generator=generator, dtype=torch.float64)
    H, G = covariance(n_in, generator), covariance(n_out, generator)
    lifted = G + GRADIENT_DAMPING * G.diagonal().mean() * torch.eye(n_out, dtype=G.dtype)
    g = torch.linalg.cholesky(lifted if with_gradients else torch.eye(n_out, dtype=G.dtype)).T
    h = torch.linalg.cholesky(H)
    rest = torch.cat([F, torch.zeros(n_out - n_fixed, n_in, dtype=W.dtype)])
    system = torch.kron(g[:, n_fixed:].contiguous(), (K @ h).T.contiguous())
    expected = torch.linalg.lstsq(system, (g @ (W - rest) @ h).flatten()[:, None]).solution.view(-1, k)
    found = refit(W, K, H, G if with_gradients else None, F if n_fixed else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_refit_lowers_the_loss_of_a_rounded_pivot_form(bits, generator):
    W, H, G = torch.randn(40, 24, generator=generator), covariance(24, generator), covariance(40, generator)
    C = torch.randn(28, 12, generator=generator) / 4
    W = torch.cat([W[:12], C @ W[:12]])
    rounded = feedback(W[:12], Grid(bits, 8), H).weight
    lost = {}
    for name, again in (
        ("as it was", C),
        ("rows alone", refit(W, rounded, H, None, rounded).float()),
        ("gradients too", refit(W, rounded, H, G, rounded).float()),
    ):
        E = torch.cat([rounded, again @ rounded]) - W
        lost[name] = [loss(E, H), loss(E, H, G + GRADIENT_DAMPING * G.diagonal().mean() * torch.eye(40))]
    assert lost["rows alone"][0] < lost["as it was"][0]
    assert lost["gradients too"][1] < lost["rows alone"][1] < lost["as it was"][1]


def test_a_refit_to_a_basis_of_zeros_is_zero():
    assert not refit(torch.ones(3, 4), torch.zeros(2, 4), torch.eye(4)).any()


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(2, 8), st.integers(1, 48), st.booleans(), st.integers(0, 99))
def test_invariants(n_out, n_in, bits, group, symmetric, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=generator) * 10.0 ** float(torch.randn(1, generator=generator))
    H, grid = covariance(n_in, generator), Grid(bits, group, symmetric)
    rounded = feedback(W, grid, H)
    assert rounded.codes.shape == W.shape
    assert rounded.weight.isfinite().all()
    assert rounded.scales.shape == rounded.zeros.shape == (n_out, -(-n_in // group))
    again = feedback(4 * W, grid, H)  # a power of two scales scales exactly
    assert torch.equal(again.codes, rounded.codes)
    assert torch.equal(again.weight, 4 * rounded.weight)
    assert torch.equal(feedback(W, grid, 2 * H).codes, rounded.codes)
    factor, d = unit_upper(H, 0.0)
    assert torch.allclose(factor.double() @ torch.diag(d) @ factor.double().T, H, atol=1e-5 * float(H.abs().max()))


@pytest.mark.parametrize("W", [torch.zeros(3, 8), torch.ones(3, 8), torch.eye(3, 8), torch.full((1, 1), -2.0)])
def test_degenerate(W):
    H = torch.zeros(W.shape[1], W.shape[1])
    assert torch.allclose(feedback(W, Grid(4, 4), H).weight, W, atol=0.01)


@pytest.mark.parametrize("which", ["weight", "H"])
def test_what_is_not_finite_is_refused(which):
    W, H = torch.ones(2, 3), torch.eye(3)
    (W if which == "weight" else H)[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN"):
        feedback(W, Grid(4), H)
