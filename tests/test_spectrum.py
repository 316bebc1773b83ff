"""Spectra and factors: by hand, against torch.linalg, the truncation theorem, singular and degenerate matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drank.method.covariance import NotFiniteError
from drank.method.metrics import damped
from drank.method.spectrum import Metric, effective_rank, factors, root_of, square_root, whitened_spectrum

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (1, 1)]


def rebuilt(W, spectrum, k=None):
    left, right = factors(W, **spectrum.rows(k))
    return left.double() @ right.double()


def covariance(size, rank, seed=0):
    x = torch.randn(rank, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / rank


def test_diagonal_case_by_hand():
    W = torch.diag(torch.tensor([3.0, 1.0]))
    spectrum = whitened_spectrum(W, torch.diag(torch.tensor([1.0, 16.0])))
    torch.testing.assert_close(spectrum.singular_values, torch.tensor([4.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(rebuilt(W, spectrum, 1), torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("sides", [0, 1, 2])
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 10), st.data())
def test_dropped_energy_is_the_error_in_the_metric_and_svd_cannot_do_better(sides, n_out, n_in, rank, data):
    """With no metric it is the plain SVD; one metric serves two weights."""
    seed = data.draw(st.integers(0, 999))
    W = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))
    H = covariance(n_in, rank, seed) if sides else torch.eye(n_in).double()
    G = covariance(n_out, rank + 1, seed + 1) if sides == 2 else torch.eye(n_out).double()
    metrics = [Metric(H), Metric(G)][:sides]
    spectrum = [whitened_spectrum(weight, *metrics) for weight in (-2 * W, W)][1]
    expected = torch.linalg.svdvals(square_root(G) @ W.double() @ square_root(H))
    found = torch.zeros_like(expected)
    found[: len(spectrum.singular_values)] = spectrum.singular_values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * float(expected[0]))
    k = data.draw(st.integers(0, len(spectrum.singular_values)))
    D = W.double() - rebuilt(W, spectrum, k)
    scale = float(torch.trace(G @ W.double() @ H @ W.double().T))
    measured = float(torch.trace(G @ D @ H @ D.T))
    assert measured == pytest.approx(float((spectrum.singular_values[k:] ** 2).sum()), abs=1e-6 * scale)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(NotFiniteError, match="1 of 2 entries of the weight"):
        whitened_spectrum(torch.tensor([[float("nan"), 1.0]]), torch.eye(2))
    with pytest.raises(NotFiniteError, match="4 of 4 entries of the input metric"):
        whitened_spectrum(torch.ones(1, 2), torch.full((2, 2), float("inf")))


def test_damping_adds_a_share_of_the_mean_diagonal():
    assert damped(torch.diag(torch.tensor([1.0, 3.0])), 0.5).tolist() == [[2.0, 0.0], [0.0, 4.0]]


@pytest.mark.parametrize("rank", [0, 1, 3, None])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_singular_covariances_and_a_zero_matrix_are_harmless(shape, rank):
    """A covariance of no rank is zero; None stands for a matrix of zeros. Both keep one component of zero."""
    W = torch.zeros(shape) if rank is None else torch.randn(shape)
    H = covariance(shape[1], rank or 9) * (rank != 0)
    spectrum, rank = whitened_spectrum(W, H), rank or 0
    assert spectrum.singular_values.any() == (rank > 0)
    assert len(spectrum.singular_values) == max(1, rank)
    assert spectrum.n_discarded == 4 - max(1, rank)
    assert all(torch.isfinite(t).all() for t in spectrum.rows().values())
    D = W.double() - rebuilt(W, spectrum)
    assert float(torch.trace(D @ H.double() @ D.T)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("condition", [1e6, 1e12, 1e30])
def test_badly_scaled_covariances_keep_the_error_theorem(condition):
    W = torch.randn(6, 8)
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    H = Q @ torch.diag(torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)) @ Q.T
    spectrum = whitened_spectrum(W, H)
    D = W.double() - rebuilt(W, spectrum, 2)
    assert float(torch.trace(D @ H @ D.T)) == pytest.approx(float((spectrum.singular_values[2:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metrics", ["none", "input", "output", "both"])
def test_only_the_smaller_side_is_stored_and_duals_only_where_they_differ(shape, metrics):
    H = covariance(shape[1], 50) if metrics in ("input", "both") else None
    G = covariance(shape[0], 50, seed=1) if metrics in ("output", "both") else None
    W = torch.randn(shape)
    spectrum = whitened_spectrum(W, H, G)
    left, right = factors(W, **spectrum.rows())
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # so neither loses more when it is rounded
    near = G if shape[0] <= shape[1] else H
    assert spectrum.vectors.shape == (len(spectrum.singular_values), min(shape))
    assert (spectrum.duals is None) == (near is None)
    duals = spectrum.vectors if spectrum.duals is None else spectrum.duals
    torch.testing.assert_close(spectrum.vectors @ duals.T, torch.eye(len(duals)), rtol=0, atol=1e-4)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_effective_rank_lies_between_one_and_the_count_and_ignores_scale_and_zeros(values, scale):
    s = torch.tensor(values, dtype=torch.float64)
    R = effective_rank(s)
    assert 1 - 1e-9 <= R <= len(values) + 1e-9
    assert effective_rank(s * scale) == pytest.approx(R, rel=1e-6)
    assert effective_rank(torch.cat([s, s.new_zeros(3)])) == pytest.approx(R)
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.zeros(4)) == 1


@pytest.mark.parametrize("rank", [0, 2, 9])
def test_any_root_times_its_transpose_is_the_covariance(rank):
    H = covariance(6, rank) if rank else torch.zeros(6, 6, dtype=torch.float64)
    torch.testing.assert_close(root_of(H) @ root_of(H).T, H)
    if rank == 9:
        torch.testing.assert_close(root_of(H), torch.linalg.cholesky(H))
