"""Kullback-Leibler divergence of two models' predictions: by hand, against torch, and what must always hold."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drank.model.divergence import divergence, token_divergence
from tests import tiny


class Fixed(nn.Module):
    """The same distribution at every position."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, ids):
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_by_hand():
    windows = torch.zeros(2, 3, dtype=torch.long)
    found = token_divergence(Fixed([0.5, 0.5]), Fixed([0.25, 0.75]), windows)
    assert found == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_against_torch_on_real_models_and_zero_for_the_same(generator):
    model, other = tiny.llama(), tiny.llama()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    windows = torch.randint(0, 320, (3, 10), generator=generator)
    log_p, log_q = (m(windows).logits.log_softmax(-1).flatten(0, 1) for m in (model, other))
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert expected > 0.1
    assert token_divergence(model, other, windows) == pytest.approx(expected.item(), rel=1e-4)
    assert token_divergence(model, model, windows) == 0
    assert token_divergence(other, model, windows) > 0


def test_its_gradient_is_that_of_torch(generator):
    """Found logits have one, in their dtype; expected ones have none."""
    expected, found = (torch.randn(7, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, theirs = (found.float().clone().requires_grad_() for _ in range(2))
    given = expected.float().requires_grad_()
    (3 * divergence(given, ours)).backward()
    assert given.grad is None
    p, q = expected.float().log_softmax(-1), theirs.log_softmax(-1)
    (3 * F.kl_div(q, p, log_target=True, reduction="sum") / 7).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    half = found.bfloat16().requires_grad_()
    divergence(expected.bfloat16(), half).backward()
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(3 * half.grad.float(), theirs.grad, rtol=0.05, atol=2e-3)
