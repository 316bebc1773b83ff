"""ASVD's measurement: the perplexity of a model with one weight replaced, and a model left exactly as it was."""

from functools import partial

import pytest
import torch

from drank.method.spectrum import whitened_spectrum
from drank.model.divergence import divergence_from, token_divergence
from drank.model.linears import find_linears
from drank.model.perplexity import NotFiniteLossError
from drank.model.substitution import measure_sensitivity
from tests import tiny

RATIOS = [0.3, 0.8]


@pytest.fixture
def windows():
    return torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(2))


def svd(linears):
    """A reader of plain truncated SVD, from the weights as they are now."""
    spectra = {linear.name: whitened_spectrum(linear.weight.detach().float()) for linear in linears}
    return lambda name, rank: spectra[name].rows(rank)


def rank_of(linears):
    full = {linear.name: min(linear.out_features, linear.in_features) for linear in linears}
    return lambda name, ratio: max(1, int(ratio * full[name]))


def perplexity_of(model, windows):
    return lambda: tiny.token_perplexity(model, windows, 2)[0]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_a_score_is_the_perplexity_with_that_weight_alone_replaced(build, windows):
    model = build()
    linears = find_linears(model, ["re:.*"])[:3]
    read, offered = svd(linears), rank_of(linears)
    dense, before = tiny.token_perplexity(model, windows, 2)[0], state(model)

    def rank(name, ratio):  # a ratio without a rank is left out
        return None if ratio == 0.5 else offered(name, ratio)

    scores = measure_sensitivity(model, linears, read, perplexity_of(model, windows), [0.3, 0.5, 1.0], rank)
    assert unchanged(model, before)
    for linear in linears:
        assert scores[linear.name][1.0] == pytest.approx(dense, rel=1e-5)
        assert scores[linear.name][0.3] not in (dense, scores[linear.name][1.0])
        by_hand = build()
        with torch.no_grad():
            target = next(x for x in find_linears(by_hand, ["re:.*"]) if x.name == linear.name)
            U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
            k = rank(linear.name, 0.3)
            target.weight.copy_((U[:, :k] * S[:k]) @ Vh[:k])
        assert scores[linear.name][0.3] == pytest.approx(tiny.token_perplexity(by_hand, windows, 2)[0], rel=1e-6)
    assert list(scores) == [linear.name for linear in linears]
    assert all(list(row) == [0.3, 1.0] for row in scores.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_low_precision_come_back_bit_for_bit_after_an_error_too(dtype, windows):
    model = tiny.llama().to(dtype)
    linears = find_linears(model, ["down_proj"])
    before, rank = state(model), rank_of(linears)
    measure_sensitivity(model, linears, svd(linears), perplexity_of(model, windows), RATIOS, rank)
    assert unchanged(model, before)
    broken = {"vectors": torch.full((9, 32), torch.nan)}
    with pytest.raises(NotFiniteLossError, match=r"layers\.0\.mlp\.down_proj at ratio 0.3 \(rank 9\): window 0"):
        measure_sensitivity(model, linears, lambda name, k: broken, perplexity_of(model, windows), RATIOS, rank)
    assert unchanged(model, before)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad for p in model.parameters())


def test_a_score_may_be_the_divergence_from_the_model_as_it_was(windows):
    model, by_hand = tiny.llama(), tiny.llama()
    linears = find_linears(model, ["down_proj"])[:1]
    scores = measure_sensitivity(
        model, linears, svd(linears), partial(divergence_from(model, windows), model), [1.0, 0.3], rank_of(linears)
    )[linears[0].name]
    with torch.no_grad():
        target = find_linears(by_hand, ["down_proj"])[0].weight
        U, S, Vh = torch.linalg.svd(target, full_matrices=False)
        target.copy_((U[:, :9] * S[:9]) @ Vh[:9])
    assert scores[0.3] == pytest.approx(token_divergence(model, by_hand, windows), rel=0.01)
    assert abs(scores[1.0]) < 1e-6 < scores[0.3]
