"""Output order of pivot layers folded into their MLP: the same function with fewer indices, in any mixture of forms."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from drank.model.groups import find_mlps
from drank.model.layers import PivotLinear
from drank.model.linears import find_linears
from drank.steps.compression import compress
from tests import tiny
from tests.test_compression import IDS, row, singles, vectors_of


def biased(build):
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def compressed(build, forms, rank=9):
    """A model whose linears before and behind the nonlinearity of the first MLP have the forms given."""
    model = biased(build)
    mlp = find_mlps(model, find_linears(model, ["re:.*"]))[0]
    rows = [row((x,), form, rank) for x, form in zip((*mlp.before, mlp.down), forms, strict=True)]
    return compress(model, rows, vectors_of(singles(model)), {}), mlp


GATED = [
    *itertools.product(("dense", "pivot"), repeat=3), ("factors", "pivot", "factors"), ("pivot", "factors", "dense"),
    ("factors", "factors", "pivot"),
]  # fmt: skip
UNGATED = [*itertools.product(("dense", "pivot"), repeat=2), ("factors", "pivot"), ("pivot", "factors")]


@pytest.mark.parametrize(
    ("build", "forms"), [*itertools.product([tiny.llama], GATED), *itertools.product([tiny.gpt2], UNGATED)]
)
def test_the_model_is_the_same_function_and_the_first_pivot_layer_has_no_places(build, forms, monkeypatch, tmp_path):
    torch.manual_seed(0)
    folded, mlp = compressed(build, forms)
    monkeypatch.setattr("drank.steps.compression.fold_channel_order", lambda _model, stored: list(stored))
    torch.manual_seed(0)
    plain, _ = compressed(build, forms)
    torch.testing.assert_close(folded(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    leader = next((x.name for x, form in zip(mlp.before, forms, strict=False) if form == "pivot"), None)
    in_order = [n for n, m in folded.named_modules() if isinstance(m, PivotLinear) and m.in_order]
    assert in_order == ([leader] if leader else [])
    assert not any(isinstance(m, PivotLinear) and m.in_order for m in plain.modules())
    folded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, folded(IDS).logits)
    if set(forms) != {"dense"}:
        dense = again.dequantize()
        torch.testing.assert_close(dense(IDS).logits, folded(IDS).logits, rtol=1e-3, atol=1e-4)


def test_an_mlp_with_parameters_of_its_own_is_left_alone():
    model = biased(tiny.llama)
    mlp = find_mlps(model, find_linears(model, ["re:.*"]))[0]
    model.get_submodule(mlp.name).register_parameter("scale", torch.nn.Parameter(torch.ones(mlp.n_channels)))
    rows = [row((x,), "pivot", 9) for x in (*mlp.before, mlp.down)]
    compress(model, rows, vectors_of(singles(model)), {})
    assert not any(isinstance(m, PivotLinear) and m.in_order for m in model.modules())
