"""The benchmarks compare like with like: the yardstick's answers are ours. No times are asserted."""

import importlib
import sys

import pytest
import torch
from benchmarks import yardstick
from benchmarks.covariance_overhead import collect, covariance_flops, pass_flops

from drank.method.spectrum import factors, whitened_spectrum
from drank.model.linears import find_linears, shared_inputs
from tests.tiny import llama


@pytest.mark.parametrize(("out", "n"), [(12, 12), (5, 12), (12, 5)])
def test_yardstick_and_spectrum_are_the_same_truncated_svd(out, n):
    torch.manual_seed(0)
    W, x = torch.randn(out, n), torch.randn(200, n) * torch.linspace(0.1, 3, n)
    xtx = yardstick.accumulated(yardstick.accumulated(None, x[:120]), x[120:])
    S, S_inverse = yardstick.whitened(xtx)
    basis, coefficients = yardstick.factors(W, S, S_inverse)
    ours = whitened_spectrum(W, xtx.double())
    torch.testing.assert_close(yardstick.singular_values(W, S).double(), ours.singular_values, rtol=1e-4, atol=1e-4)
    for k in (1, 3, 5):
        left, right = factors(W, **ours.rows(k))
        torch.testing.assert_close((basis[:, :k] @ coefficients[:k]).T, left @ right, rtol=1e-4, atol=1e-4)


def test_yardstick_shifts_what_is_not_positive():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    S, S_inverse = yardstick.whitened(x.T @ x - 1e-3 * torch.eye(6))
    assert torch.isfinite(S_inverse).all()
    torch.testing.assert_close(S.T @ S, (x.T @ x).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("fisher", ["none", "gaussian"])
def test_collected_moments_and_their_flops(fisher):
    model, windows = llama(), torch.randint(320, (2, 8), generator=torch.Generator().manual_seed(0))
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, windows)
    inputs, gradients = collect(model, windows, linears, owners, fisher)
    assert {m.n_tokens for m in inputs.values()} == {16}
    moments = [*inputs.values(), *gradients.values()]
    assert covariance_flops(linears, owners, fisher) == sum(2 * m.total.numel() for m in moments)
    assert len(gradients) == (14 if fisher == "gaussian" else 0)


def test_flops_of_passes_by_hand():
    model = llama()  # hidden 32, intermediate 64, two layers, values and keys 16 wide, vocabulary 320
    one = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert pass_flops(model, find_linears(model, ["re:.*"]), "none") == 2 * one
    assert pass_flops(model, find_linears(model, ["re:.*"]), "gaussian") == 2 * (2 * one + 2 * 320 * 32)


@pytest.mark.parametrize(
    "script",
    [
        "ratio_sweep",
        "first_run",
        "covariance_overhead",
        "linear_cost",
        "output_order",
        "pivot_layer",
        "memory",
        "vllm_speed",
    ],
)
def test_scripts_explain_themselves(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"benchmarks.{script}").main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "--rounds" in shown
    assert f"python -m benchmarks.{script}" in shown
