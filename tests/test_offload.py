"""A block at a time: the same covariances to the bit on several architectures; what cannot be split is refused."""

import shutil

import pytest
import torch
from stages.covariance import main as stage
from torch import nn
from transformers import AutoModelForCausalLM

from drank.model.capture import (
    run_backward,
    run_windows,
    split_windows,
    watching_inputs,
    watching_output_gradients,
)
from drank.model.linears import find_linears
from drank.model.offload import OffloadError, disk_map, find_blocks, offloaded_sweeps
from drank.project.files import write_tensors
from tests import tiny

CHANGES = {
    "llama": {"num_hidden_layers": 4},
    "gemma2": {"sliding_window": 8},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
}


def watched(model, linears, passes, inputs=True, gradients=True):
    """Everything that enters the linears and comes back to them in some passes, in order."""
    seen = {}
    modules = {linear.name: linear.module for linear in linears}

    def remember(kind):
        return lambda name, rows: seen.setdefault((kind, name), []).append(rows)

    with (
        watching_inputs(modules if inputs else {}, remember("input")),
        watching_output_gradients(modules if gradients else {}, remember("gradient")),
    ):
        for _ in passes:
            pass
    return {key: torch.cat(rows) for key, rows in seen.items()}


def offloaded(model, linears, windows, fisher, store):
    seen = {}
    blocks = find_blocks(model, linears)
    for sweep in offloaded_sweeps(model, blocks, split_windows(windows, 2), fisher, 3, store):
        within = [linear for linear in linears if linear.name.startswith(sweep.prefix)]
        seen |= watched(model, within, sweep.passes, sweep.inputs, sweep.gradients)
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "qwen3", "bloom", "falcon", "phi"])
@pytest.mark.parametrize("fisher", ["none", "gaussian", "sampled", "empirical"])
def test_a_block_at_a_time_shows_the_same_bits_as_all_at_once(tmp_path, name, fisher):
    model = tiny.decoder(name, **CHANGES.get(name, {}))
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    windows = torch.randint(1, 300, (5, 12))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    linears = find_linears(model, ["re:.*"])
    passes = run_windows(model, windows, 2) if fisher == "none" else run_backward(model, windows, 2, fisher, 3)
    expected = watched(model, linears, passes, gradients=fisher != "none")
    places = disk_map(model, find_blocks(model, linears))
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map=places, offload_folder=tmp_path / "weights"
    ).eval()
    linears = find_linears(there, ["re:.*"])
    assert all(linear.module.weight.is_meta for linear in linears)
    store = {}
    found = offloaded(there, linears, windows, fisher, store)
    assert found.keys() == expected.keys()
    assert [key for key, rows in found.items() if not torch.equal(rows, expected[key])] == []
    assert all(linear.module.weight.is_meta for linear in linears), "weights are gone again"
    assert not any(name.split("-")[0] in "0123" for name in store if fisher != "none"), "used up"


def refused(model, fisher):
    windows = torch.randint(0, 300, (1, 8))
    model(windows)  # the model itself is sound
    with pytest.raises(OffloadError) as error:
        offloaded(model, find_linears(model, ["re:.*"]), windows, fisher, {})
    assert not any("forward" in vars(block) for block in model.model.layers), "the model is as it was"
    return str(error.value)


def keeping_outputs_of_block_0(model):
    kept = []
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: kept.append(output))
    return kept


@pytest.mark.parametrize("fisher", ["none", "gaussian"])
def test_a_block_that_reads_older_hidden_states_is_refused(fisher):
    model = tiny.llama(num_hidden_layers=3)
    kept = keeping_outputs_of_block_0(model)
    model.model.layers[2].register_forward_pre_hook(lambda _module, args: (args[0] + kept[-1],))
    assert "model.layers.2 takes in NaN" in refused(model, fisher)


def test_a_head_that_reads_older_hidden_states_is_refused():
    model = tiny.llama(num_hidden_layers=3)
    kept = keeping_outputs_of_block_0(model)
    model.model.norm.register_forward_pre_hook(lambda _module, args: (args[0] + kept[-1],))
    assert "the output head takes in NaN" in refused(model, "gaussian")


class Pair(nn.Module):
    """A block that hands a second tensor on, and adds the one it was handed."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, *args, **kwargs):
        hidden, second = hidden if isinstance(hidden, tuple) else (hidden, 0)
        return self.block(hidden + second, *args, **kwargs), hidden


class Dictionary(Pair):
    def forward(self, hidden, *args, **kwargs):
        hidden = hidden["hidden"] if isinstance(hidden, dict) else hidden
        return {"hidden": self.block(hidden, *args, **kwargs)}


@pytest.mark.parametrize(("kind", "message"), [(Pair, "model.layers.1 takes in NaN"), (Dictionary, "puts out a dict")])
def test_blocks_that_hand_on_more_than_hidden_states_are_refused(kind, message):
    model = tiny.llama(num_hidden_layers=3)
    model.model.layers = nn.ModuleList(kind(block) for block in model.model.layers)
    model.model.norm.register_forward_pre_hook(
        lambda _module, args: (args[0]["hidden"] if isinstance(args[0], dict) else args[0][0],)
    )
    assert message in refused(model, "none")


def test_activations_that_overflow_are_no_leak():
    """NaN that a block makes by itself goes on to the covariances, which name it."""
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    linears = find_linears(model, ["re:.*"])
    seen = offloaded(model, linears, torch.randint(0, 300, (1, 8)), "gaussian", {})
    assert seen["input", "model.layers.1.mlp.up_proj"].isnan().any()


def test_linears_in_several_places_are_refused():
    model = tiny.llama()
    model.other = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(OffloadError, match=r"are in model.layers, other, but .*covariance.ignore"):
        find_blocks(model, find_linears(model, ["re:.*"]))
    model.other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(OffloadError, match="are in other, but"):
        find_blocks(model, find_linears(model, ["re:other.*"]))


@pytest.mark.parametrize("fisher", ["none", "gaussian"])
def test_the_stage_writes_the_same_files_and_clears_up(tmp_path, fisher):
    tiny.project(tmp_path)
    write_tensors(tmp_path / "data/sampling/calibration/0.safetensors", {"windows": torch.randint(0, 300, (5, 12))})
    shutil.copytree(tmp_path / "source/model", tmp_path / "data/raw/model")
    params = (tmp_path / "params.yaml").read_text().replace("fisher: empirical", f"fisher: {fisher}")
    params = (
        params
        if fisher != "none"
        else params.replace("metric: kfac", "metric: input")
        .replace("block", "matrix")
        .replace("    cuts: [0.0, 0.25, 0.5]\n", "")
    )
    digests = []
    for offload in ("false", "true"):
        (tmp_path / "params.yaml").write_text(params.replace("  threads", f"  offload: {offload}\n  threads", 1))
        stage("0", tmp_path)
        digests.append(tiny.folder_sha256(tmp_path / "data/covariance/0"))
        assert [file.name for file in (tmp_path / "data/covariance").iterdir()] == ["0"]
    assert digests[0] == digests[1]
