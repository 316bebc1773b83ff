"""Finding linears, their roles and shared inputs on real small architectures."""

import pytest
import torch
import yaml
from torch import nn

from drank.model.linears import (
    NoTargetsError,
    PatternError,
    UnreachedError,
    find_linears,
    layer_index,
    shared_inputs,
    survey,
    unreached,
)
from tests import tiny

IDS = torch.arange(6)[None]


def test_a_llama_has_seven_linears_a_layer_and_its_head_is_none_of_them():
    linears = find_linears(tiny.llama(tie_word_embeddings=False), ["re:.*"])
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [(linear.layer, linear.kind) for linear in linears] == [(i, kind) for i in (0, 1) for kind in kinds]
    assert [linear.role for linear in linears[:4]] == ["query", "key", "value", "output"]
    assert (linears[1].out_features, linears[1].in_features) == (16, 32)


def test_a_gpt2_has_out_by_in_weights_and_kinds_that_tell_its_linears_apart():
    linears = find_linears(tiny.gpt2(), ["re:.*"])
    assert [x.kind for x in linears] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"] * 2
    assert (linears[0].out_features, linears[0].in_features) == (96, 32) == tuple(linears[0].weight.shape)
    assert linears[0].role == "query_key_value"
    alone = [x.kind for x in find_linears(tiny.gpt2(), ["mlp.c_proj"])]
    assert alone == ["mlp.c_proj"] * 2, "whatever is targeted"
    assert [layer_index(n) for n in ("model.layers.11.mlp.up", "transformer.h.0.attn", "lm_head")] == [11, 0, None]


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
        (["model.layers.0.self_attn.q_proj"], [], 1),
        (["mlp.up_proj", "down_proj"], [], 4),
        (["re:.*"], ["re:.*layers\\.0\\..*"], 7),
        (["re:.*self_attn"], [], 8),  # from the beginning on, not to the end: re.match, as in compressed-tensors
        (["Linear"], ["lm_head"], 14),
        (["Linear"], ["re:.*mlp", "Embedding"], 8),
    ],
)
def test_patterns_are_those_of_compressed_tensors_and_ends_of_names(targets, ignore, count):
    assert len(find_linears(tiny.llama(), targets, ignore)) == count


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["proj"], [], "covariance.targets: 'proj' matches nothing.*down_proj, gate_proj, k_proj, lm_head, o_proj"),
        (["q_proj", "k_prj"], [], "covariance.targets: 'k_prj' matches nothing"),
        (["re:.*"], ["mlp"], "covariance.ignore: 'mlp' matches nothing"),
        (["re:self_attn"], [], "matches from the name's beginning on"),
        (["re:*"], [], "covariance.targets: 're:\\*' is no regular expression: nothing to repeat"),
        (["embed_tokens"], [], "covariance.targets: 'embed_tokens' matches nothing"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(targets, ignore, message):
    with pytest.raises(PatternError, match=message):
        find_linears(tiny.llama(), targets, ignore)


def test_patterns_that_leave_nothing_are_refused_with_what_the_model_has():
    with pytest.raises(NoTargetsError, match=r"targets \['lm_head'\].*q_proj.weight \(matches no target\)"):
        find_linears(tiny.llama(), ["lm_head"])
    with pytest.raises(PatternError, match="there is no linear"):
        find_linears(nn.Sequential(nn.ReLU()), ["re:.*"])


def test_a_linear_that_no_token_reaches_is_named_with_the_pattern_that_leaves_it_out():
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.spare_proj = nn.Linear(3, 3)
    reached = "through model.layers.0.mlp.spare_proj, model.layers.1.*2 linears"
    with pytest.raises(UnreachedError, match=reached) as error:
        shared_inputs(model, find_linears(model, ["re:.*"]), IDS)
    (pattern,) = yaml.safe_load(str(error.value).partition("covariance.ignore: ")[2])
    linears = find_linears(model, ["re:.*"], [pattern])
    assert len(linears) == len(shared_inputs(model, linears, IDS)) == 14


def test_an_expert_that_a_few_tokens_miss_reads_alone():
    model = tiny.llama()
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(3, 3)})])
    name = "model.layers.0.mlp.experts.0.w1"
    assert shared_inputs(model, find_linears(model, ["q_proj", "w1"]), IDS)[name] == name
    (pattern,) = yaml.safe_load(str(unreached("nothing entered", [name])).partition("covariance.ignore: ")[2])
    assert pattern == r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.w1"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def left_of(model, targets=("re:.*",), ignore=()):
    return {row.name: row.reason for row in survey(model, targets, ignore)[1]}


def test_every_parameter_is_a_target_or_left_with_a_reason():
    model = tiny.llama(tie_word_embeddings=False)
    chosen, left = survey(model, ["re:.*"], ["re:.*layers.0.*mlp"])
    assert sum(x.weight.numel() for x in chosen) + sum(row.parameters for row in left) == model.num_parameters()
    rows = {(row.name, row.reason): (row.tensors, row.parameters) for row in left}
    assert rows == {
        ("model.embed_tokens.weight", "embedding"): (1, 320 * 32),
        ("lm_head.weight", "output head"): (1, 320 * 32),
        ("vectors", "norms, biases and the like"): (5, 5 * 32),
        ("model.layers.*.mlp.gate_proj.weight", "ignored: re:.*layers.0.*mlp"): (1, 64 * 32),
        ("model.layers.*.mlp.up_proj.weight", "ignored: re:.*layers.0.*mlp"): (1, 64 * 32),
        ("model.layers.*.mlp.down_proj.weight", "ignored: re:.*layers.0.*mlp"): (1, 64 * 32),
    }


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_weights_of_experts_are_left_by_name(architecture):
    model = tiny.decoder(architecture)
    left = left_of(model, ignore=["re:.*experts$", "re:.*(gate|router)$"])
    kind = type(model.model.layers[1].mlp.experts).__name__
    assert left["model.layers.*.mlp.experts.gate_up_proj"] == f"no linear, but {kind}"


def test_modules_that_are_more_than_a_matrix_are_left():
    model = tiny.llama()
    first, second = (layer.mlp for layer in model.model.layers)
    first.gate_proj, first.extra = Doubled(32, 64), Spelled(32, 64)
    second.narrow = nn.Linear(32, 1)
    second.tied = nn.Linear(64, 32)
    second.tied.weight = second.down_proj.weight
    left = left_of(model)
    layers = "model.layers.*.mlp."
    assert left[layers + "gate_proj.weight"] == "Doubled computes something else than W x + b"
    assert left[layers + "narrow.weight"] == "a single row or column: no rank is smaller"
    assert left[layers + "down_proj.weight"] == f"the same tensor as {layers}tied.weight"
    assert layers + "extra.weight" not in left, "another spelling of the same"


ROLES_OF = {
    "bloom codegen gpt2 gpt_bigcode gpt_neox mpt persimmon": "query_key_value output up down",
    "deepseek_v2 deepseek_v3":
        "query_latent query_of_latent key_value_latent key_value_of_latent output gate up down",
    "gptj opt phi": "query key value output up down",
    "lfm2": "query key value output gate up down",
    "modernbert-decoder": "query key value output gate_up down",
    "phi3": "query_key_value output gate_up down",
}  # fmt: skip


@pytest.mark.parametrize(("architectures", "roles"), ROLES_OF.items())
def test_roles_of_other_names(architectures, roles):
    for architecture in architectures.split():
        found = {x.role for x in find_linears(tiny.decoder(architecture), ["re:.*"]) if x.layer == 1}
        assert found == set(roles.split()), architecture
