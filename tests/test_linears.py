"""Finding linears, their roles and shared inputs on real small architectures."""

import pytest
import torch

from drank.language_model.linears import NoTargetsError, find_linears, layer_index, shared_inputs
from tests import tiny

IDS = torch.arange(6)[None]


def test_a_llama_has_seven_linears_a_layer_and_its_head_is_none_of_them():
    linears = find_linears(tiny.llama(tie_word_embeddings=False), ["re:.*"])
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [(linear.layer, linear.kind) for linear in linears] == [(i, kind) for i in (0, 1) for kind in kinds]
    assert [linear.role for linear in linears[:4]] == ["query", "key", "value", "output"]
    assert (linears[1].out_features, linears[1].in_features) == (16, 32)


def test_conv1d_weights_are_given_as_out_by_in():
    linear = find_linears(tiny.gpt2(), ["c_attn"])[0]
    assert (linear.out_features, linear.in_features) == (96, 32) == tuple(linear.weight.shape)
    assert linear.role == "query_key_value"


def test_shared_inputs_are_seen_not_assumed():
    model = tiny.llama()
    owners = shared_inputs(model, find_linears(model, ["re:.*"]), IDS)
    first = "model.layers.1."
    assert owners[first + "self_attn.v_proj"] == owners[first + "self_attn.k_proj"] == first + "self_attn.q_proj"
    assert owners[first + "mlp.up_proj"] == first + "mlp.gate_proj"
    assert owners[first + "mlp.down_proj"] == first + "mlp.down_proj"
    assert len(set(owners.values())) == 8


@pytest.mark.parametrize(
    ("targets", "ignore", "count"),
    [
        (["q_proj"], [], 2),
        (["mlp.up_proj", "down_proj"], [], 4),
        (["re:.*"], ["re:.*layers\\.0\\..*"], 7),
        (["proj"], [], 0),
    ],
)
def test_patterns_are_suffixes_or_whole_expressions(targets, ignore, count):
    if not count:
        with pytest.raises(NoTargetsError, match="no linear layer matches.*down_proj, gate_proj"):
            find_linears(tiny.llama(), targets, ignore)
    else:
        assert len(find_linears(tiny.llama(), targets, ignore)) == count


def test_a_model_without_layers_of_linears_is_refused():
    with pytest.raises(NoTargetsError, match="none"):
        find_linears(torch.nn.Sequential(torch.nn.ReLU()), ["re:.*"])


def test_a_linear_that_no_token_reaches_is_named():
    model = tiny.llama()
    model.model.layers[0].mlp.spare_proj = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no input reached model.layers.0.mlp.spare_proj"):
        shared_inputs(model, find_linears(model, ["re:.*"]), IDS)


@pytest.mark.parametrize(
    ("name", "layer"), [("model.layers.11.mlp.up", 11), ("transformer.h.0.attn", 0), ("lm_head", None)]
)
def test_layer_index_is_the_first_number(name, layer):
    assert layer_index(name) == layer
