"""A block at a time: the same covariances to the bit on several architectures; what cannot be split is refused."""

import shutil

import pytest
import torch
from stages.covariance import main as stage
from torch import nn
from transformers import AutoModelForCausalLM

from drank.model.capture import split_windows, watching_inputs, watching_output_gradients
from drank.model.linears import find_linears
from drank.model.offload import OffloadError, disk_map, find_blocks, sweeps
from drank.project.files import write_tensors
from tests import tiny

ARCHITECTURES = {
    "llama": {"num_hidden_layers": 4}, "gpt2": {}, "gpt_neox": {}, "gemma2": {"sliding_window": 8}, "opt": {},
    "bloom": {}, "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True}, "phi": {},
}  # fmt: skip


def watched(model, windows, fisher, store):
    """Everything that enters the linears and comes back to them, all at once or, with a store, block after block."""
    seen, linears = {}, find_linears(model, ["re:.*"])

    def remember(kind):
        return lambda name, rows: seen.setdefault((kind, name), []).append(rows)

    for sweep in sweeps(model, linears, split_windows(windows, 2), fisher, 3, store):
        within = {linear.name: linear.module for linear in linears if linear.name.startswith(sweep.prefix)}
        with (
            watching_inputs(within if sweep.inputs else {}, remember("input")),
            watching_output_gradients(within if sweep.gradients else {}, remember("gradient")),
        ):
            assert sum(sweep.passes) == sweep.n_windows
    return {key: torch.cat(rows) for key, rows in seen.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_block_at_a_time_shows_the_same_bits_as_all_at_once(tmp_path, name):
    model = tiny.decoder(name, **ARCHITECTURES[name])
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    windows = torch.randint(1, 300, (5, 12))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    linears = find_linears(model, ["re:.*"])
    options = {"device_map": disk_map(model, find_blocks(model, linears)), "offload_folder": tmp_path / "weights"}
    there = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options).eval()
    # All draws on one architecture: the others differ in their blocks alone.
    for fisher in ("none", "gaussian", "sampled", "empirical") if name == "llama" else ("none", "empirical"):
        store = {}
        found, expected = watched(there, windows, fisher, store), watched(model, windows, fisher, None)
        assert found.keys() == expected.keys()
        assert [key for key, rows in found.items() if not torch.equal(rows, expected[key])] == []
        assert all(there.get_submodule(linear.name).weight.is_meta for linear in linears), "weights are gone again"
        assert not any(key.split("-")[0] in "0123" for key in store if fisher != "none"), "used up"


def refused(model, fisher):
    windows = torch.randint(0, 300, (1, 8))
    model(windows)  # the model itself is sound
    with pytest.raises(OffloadError) as error:
        watched(model, windows, fisher, {})
    assert not any("forward" in vars(block) for block in model.model.layers), "the model is as it was"
    return str(error.value)


@pytest.mark.parametrize(
    ("fisher", "reader", "where"),
    [
        ("none", "model.layers.2", "model.layers.2 takes"),
        ("gaussian", "model.layers.2", "model.layers.2 takes"),
        ("gaussian", "model.norm", "the output head takes"),
    ],
)
def test_what_reads_older_hidden_states_is_refused(fisher, reader, where):
    model, kept = tiny.llama(num_hidden_layers=3), []
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: kept.append(output))
    model.get_submodule(reader).register_forward_pre_hook(lambda _module, args: (args[0] + kept[-1],))
    assert f"{where} in NaN" in refused(model, fisher)


class Pair(nn.Module):
    """A block that hands a second tensor on, and adds the one it was handed."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, *args, **kwargs):
        hidden, second = hidden if isinstance(hidden, tuple) else (hidden, 0)
        return self.block(hidden + second, *args, **kwargs), hidden


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    model = tiny.llama(num_hidden_layers=3)
    model.model.layers = nn.ModuleList(map(Pair, model.model.layers))
    model.model.norm.register_forward_pre_hook(lambda _module, args: args[0][:1])
    assert "model.layers.1 takes in NaN" in refused(model, "none")


def test_activations_that_overflow_are_no_leak():
    """NaN that a block makes by itself goes on to the covariances, which name it."""
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    seen = watched(model, torch.randint(0, 300, (1, 8)), "gaussian", {})
    assert seen["input", "model.layers.1.mlp.up_proj"].isnan().any()


def test_linears_in_several_places_are_refused():
    model = tiny.llama()
    model.other = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(OffloadError, match=r"are in model.layers, other, but .*covariance.ignore"):
        find_blocks(model, find_linears(model, ["re:.*"]))
    model.other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(OffloadError, match="are in other, but"):
        find_blocks(model, find_linears(model, ["re:other.*"]))


def test_the_stage_writes_the_same_files_and_clears_up(tmp_path):
    tiny.project(tmp_path)
    write_tensors(tmp_path / "data/sampling/calibration/0.safetensors", {"windows": torch.randint(0, 300, (5, 12))})
    shutil.copytree(tmp_path / "source/model", tmp_path / "data/raw/model")
    params, digests = (tmp_path / "params.yaml").read_text(), []
    for offload in ("false", "true"):
        (tmp_path / "params.yaml").write_text(params.replace("  threads", f"  offload: {offload}\n  threads", 1))
        stage("0", tmp_path)
        digests.append(tiny.folder_sha256(tmp_path / "data/covariance/0"))
        assert [file.name for file in (tmp_path / "data/covariance").iterdir()] == ["0"]
    assert digests[0] == digests[1]
