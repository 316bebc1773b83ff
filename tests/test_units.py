"""Matrices that are factored together: groups of layers by the paper's rules, and MLPs, in several architectures."""

import pytest
import torch

from drank.model.groups import find_groups, find_mlps, has_grouped_heads
from drank.model.linears import find_linears
from tests import tiny


def names(groups):
    return [[linear.name.removeprefix("model.layers.") for linear in group] for group in groups]


def test_pairs_of_layers_share_queries_keys_values_gate_and_up_but_never_output_and_down():
    linears = find_linears(tiny.llama(num_hidden_layers=3, num_key_value_heads=4), ["re:.*"])
    assert not has_grouped_heads(linears)
    groups = names(find_groups(linears, 2))
    assert groups[:3] == [[f"0.self_attn.{p}_proj", f"1.self_attn.{p}_proj"] for p in "qkv"]
    assert ["0.mlp.gate_proj", "1.mlp.gate_proj"] in groups
    assert ["2.mlp.gate_proj"] in groups, "what is left over is a smaller group"
    assert all(len(group) == 1 for group in groups if group[0].split(".")[2] in ("o_proj", "down_proj"))
    assert sorted(name for group in groups for name in group) == sorted(names([linears])[0])


def test_grouped_key_value_heads_keep_single_matrices_unless_asked():
    linears = find_linears(tiny.llama(), ["re:.*"])
    assert has_grouped_heads(linears)
    assert names(find_groups(linears, 2)) == [[name] for name in names([linears])[0]]
    assert any(len(group) == 2 for group in find_groups(linears, 2, even_with_grouped_heads=True))
    gap = find_linears(tiny.llama(num_hidden_layers=3), ["q_proj"], ["re:.*layers.1.*"])
    assert [len(group) for group in find_groups(gap, 2, even_with_grouped_heads=True)] == [1, 1]


def test_latents_are_read_within_a_layer_and_made_of_what_layers_share():
    linears = find_linears(tiny.decoder("deepseek_v3"), ["re:.*self_attn"])
    assert not has_grouped_heads(linears), "every query head has keys and values of its own"
    shared = [group[0].kind for group in find_groups(linears, 2) if len(group) == 2]
    assert shared == ["q_a_proj", "kv_a_proj_with_mqa"]


@pytest.mark.parametrize(
    ("architecture", "changes", "grouped"),
    [
        ("llama", {"num_key_value_heads": 4}, False),
        ("llama", {"num_key_value_heads": 1}, True),
        ("phi3", {"num_key_value_heads": 4}, False),
        ("phi3", {"num_key_value_heads": 2}, True),
        ("gpt_neox", {}, False),
        ("gpt2", {}, False),
        ("gpt_bigcode", {"multi_query": True}, True),
        ("gpt_bigcode", {"multi_query": False}, False),
        ("gemma3_text", {"head_dim": 16, "num_key_value_heads": 4}, False),  # heads wider than the residual stream
    ],
)
def test_grouped_heads_are_seen_in_the_widths_fused_or_not(architecture, changes, grouped):
    linears = find_linears(tiny.decoder(architecture, **changes), ["re:.*"])
    assert has_grouped_heads(linears) is grouped
    without_output = [linear for linear in linears if linear.role != "output"]
    assert has_grouped_heads(without_output) is grouped


def mlps(model, targets):
    return find_mlps(model, find_linears(model, targets))


def test_mlps_with_and_without_a_gate():
    first, second = mlps(tiny.llama(), ["re:.*"])
    assert first.name == "model.layers.0.mlp"
    assert [linear.kind for linear in first.before] == ["gate_proj", "up_proj"]
    assert (first.down.kind, first.n_channels, second.down.layer) == ("down_proj", 64, 1)
    fused = mlps(tiny.decoder("phi3"), ["re:.*"])[0]
    assert [linear.kind for linear in fused.before] == ["gate_up_proj"]
    assert fused.rows(fused.before[0], torch.tensor([0, 5])).tolist() == [0, 5, 64, 69]
    assert first.rows(first.before[1], torch.tensor([0, 5])).tolist() == [0, 5]
    gpt2 = mlps(tiny.gpt2(), ["re:.*"])
    assert [[linear.kind for linear in mlp.before] for mlp in gpt2] == [["c_fc"], ["c_fc"]]


def test_an_mlp_keeps_its_channels_if_a_part_is_no_target_or_a_norm_has_them():
    assert mlps(tiny.llama(), ["gate_proj", "down_proj"]) == mlps(tiny.llama(), ["gate_proj", "up_proj"]) == []
    assert mlps(tiny.decoder("bitnet"), ["re:.*"]) == []
    model = tiny.llama()
    model.model.layers[0].mlp.act_fn.register_parameter("slope", torch.nn.Parameter(torch.ones(1)))
    assert len(mlps(model, ["re:.*"])) == 2, "one slope for all channels is none of their own"
