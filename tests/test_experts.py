"""Experts of mixtures as linears: the same numbers, weights by tokens, what stays dense, folders, and the way back."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from drank.method.spectrum import factors as slices
from drank.model.capture import run_batches, split_windows, watching_inputs, watching_output_gradients
from drank.model.experts import ExpertsAsLinears, fused_experts, unfuse
from drank.model.format import FormatError
from drank.model.linears import UnreachedError, find_linears, shared_inputs, survey
from drank.model.quantizer import attach
from drank.project.params import read_params
from drank.project.processes import Group
from drank.steps.covariance import collect
from drank.steps.spectrum import factorise
from tests import tiny
from tests.compressed import PROVENANCE, randomise, spec
from tests.test_steps import Store

IDS = torch.arange(3, 43)[None]
MANY = {"num_experts": 16, "num_local_experts": 16}
EXPERTS = "model.layers.1.mlp.experts"


def mixture(architecture="mixtral", **changes):
    model = tiny.decoder(architecture, **changes)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def windows(n=8):
    return torch.randint(0, 320, (n, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    file = tmp_path_factory.mktemp("params") / "params.yaml"
    file.write_text(tiny.PARAMS)
    return read_params(file)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v4", "inkling2_text"])
def test_linears_compute_what_the_fused_experts_do_and_come_back_to_the_bit(architecture):
    """deepseek_v4 clamps what enters its gate; inkling2_text adds experts up in float32."""
    model = mixture(architecture)
    before, weights = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = unfuse(model, fused_experts(model))
    assert names
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    down = model.get_submodule(f"{names[0]}.0.down_proj")
    compressed = attach(model, {f"{names[0]}.0.down_proj": spec("dense", 32, down.in_features)}, PROVENANCE)
    after = compressed.dequantize().state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("architecture", ["gpt_oss", "llama4_text", "nemotron_h", "aria_text"])
def test_experts_that_compute_something_else_stay_as_they_are(architecture):
    """Biases and interleaved rows; transposed weights; no gate."""
    assert fused_experts(mixture(architecture)) == {}


def test_gate_and_up_share_an_input_though_the_probe_misses_their_expert():
    model = mixture(**MANY)
    unfuse(model, fused_experts(model))
    owners = shared_inputs(model, find_linears(model, ["re:.*"]), IDS[:, :2])
    for number in range(16):
        assert owners[f"{EXPERTS}.{number}.up_proj"] == f"{EXPERTS}.{number}.gate_proj"
        assert owners[f"{EXPERTS}.{number}.down_proj"] == f"{EXPERTS}.{number}.down_proj"


def test_an_experts_covariance_is_the_mean_over_all_tokens_with_zeros_for_those_of_others(params):
    seen = []
    model, store = mixture(), Store()
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    for ids in windows().split(4):
        logits_of(model, ids)
    hook.remove()
    described = collect(model, windows(), params.covariance, Group(), store, {})
    x, chosen = torch.cat([args[0] for args in seen]), torch.cat([args[1] for args in seen])
    assert len(x) == described["n_tokens"] == 8 * 32
    for number in range(4):
        own = x[(chosen == number).any(1)]
        name = f"{EXPERTS}.{number}.gate_proj"
        assert len(own) > 64
        torch.testing.assert_close(store[f"inputs/{name}"]["covariance"], own.T @ own / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(store[f"inputs/{name}"]["magnitude"], own.abs().mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("metric", "tolerance"), [("input", 1e-4), ("kfac", 0.35)])
def test_a_predicted_loss_is_one_per_token_of_the_text(params, metric, tolerance):
    """Dropped energies against E[|D x|²] and E[(g · D x)²] over all tokens, of which half or so go to the expert. The
    second is exact only for inputs independent of gradients; wrong weights would be a factor of 2 or 4."""
    model, store, asked = mixture(), Store(), params.covariance.model_copy(update={"batch_windows": 8})
    described = collect(model, windows(), asked, Group(), store, {})
    spectrum = params.spectrum["input"].model_copy(update={"metric": metric, "damping": 0.0})
    factors = Store()
    factorise(mixture(), spectrum, asked, store, described, windows(), Group(), factors)
    names, rank = [f"{EXPERTS}.{number}.gate_proj" for number in range(4)], 8
    linears, x, g = {name: model.get_submodule(name) for name in names}, {}, {}
    with watching_inputs(linears, x.__setitem__), watching_output_gradients(linears, g.__setitem__):
        list(run_batches(model, split_windows(windows(), 8), "empirical"))
    for name, linear in linears.items():
        vectors = {key: rows[:rank] for key, rows in factors[f"factors/{name}"].items()}
        dropped = float((factors["singular_values"][name][rank:] ** 2).sum())
        left, right = slices(linear.weight.detach(), **vectors)
        moved = x[name] @ (linear.weight - left @ right).detach().T
        squares = moved.square().sum() if metric == "input" else (moved * g[name]).sum(1).square().sum()
        assert dropped == pytest.approx(float(squares) / (8 * 32), rel=tolerance), name


def test_an_expert_that_saw_too_few_tokens_is_left_alone_by_name(params):
    model, store = mixture("qwen3_moe", **MANY), Store()
    described = collect(model, windows(), params.covariance, Group(), store, {})
    rows = {row["name"]: row for row in described["left_dense"] if "an expert that saw" in row["reason"]}
    hungry = {name for name in rows if name.startswith(EXPERTS)}
    fed = {name.rpartition(".")[0] for name in described["owners"] if name.startswith(EXPERTS)}
    assert hungry
    assert fed
    assert not hungry & fed
    assert len(hungry | fed) == 16
    assert all((row["tensors"], row["parameters"]) == (3, 3 * 32 * 16) for row in rows.values())
    linears, _ = survey(model, ["re:.*"])
    targeted = sum(linear.weight.numel() for linear in linears if linear.name in described["owners"])
    assert targeted + sum(row["parameters"] for row in described["left_dense"]) == model.num_parameters()
    summary = factorise(
        mixture("qwen3_moe", **MANY), params.spectrum["kfac"], params.covariance, store, described, windows(), Group(),
        Store(),
    )  # fmt: skip
    assert {block["name"] for block in summary["blocks"] if block["name"].startswith(EXPERTS)} == fed
    alone = params.covariance.model_copy(update={"targets": ["re:.*experts"]})
    with pytest.raises(UnreachedError, match=r"too few tokens went through model.layers.0.mlp.experts.0.gate_proj"):
        collect(mixture("qwen3_moe", **MANY), windows(1), alone, Group(), Store(), {})


@pytest.mark.parametrize(
    "changes",
    [{"ignore": ["MixtralExperts"]}, {"ignore": ["re:.*mlp.experts"]}, {"gradient_clip": (0.1, 10.0)}],
)
def test_experts_stay_fused_where_they_are_ignored_or_gradients_are_clipped(params, changes):
    model = mixture()
    described = collect(model, windows(2), params.covariance.model_copy(update=changes), Group(), Store(), {})
    assert not any(isinstance(module, ExpertsAsLinears) for module in model.modules())
    reasons = {row["name"]: row["reason"] for row in described["left_dense"]}
    assert reasons["model.layers.*.mlp.experts.gate_up_proj"] == "no linear, but MixtralExperts"


def specs(n):
    """Three experts of the second layer: one in factors, one with fewer channels, one told to be dense."""
    return {
        f"{EXPERTS}.0.gate_proj": spec("factors", n, 32, 5),
        f"{EXPERTS}.0.down_proj": spec("pivot", 32, n, 7),
        f"{EXPERTS}.1.gate_proj": spec("pivot", n - 4, 32, 6),
        f"{EXPERTS}.1.up_proj": spec("dense", n - 4, 32),
        f"{EXPERTS}.1.down_proj": spec("factors", 32, n - 4, 6),
        f"{EXPERTS}.2.up_proj": spec("dense", n, 32),
    }


@pytest.fixture(scope="module", params=[("mixtral", 64), ("qwen3_moe", 16), ("deepseek_v3", 16)])
def folder(request, tmp_path_factory):
    architecture, n = request.param
    model, folder = attach(mixture(architecture), specs(n), PROVENANCE), tmp_path_factory.mktemp(architecture)
    for name in specs(n):
        randomise(model.get_submodule(name))
    model.save_pretrained(folder)
    return folder, model


def load(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def test_a_folder_whose_experts_alone_are_compressed_loads_saves_and_becomes_plain(folder, tmp_path):
    source, model = folder
    again = load(source)
    assert torch.equal(logits(again), logits(model))
    names = load_file(source / "model.safetensors").keys()
    assert {f"{EXPERTS}.0.gate_proj.basis", f"{EXPERTS}.3.up_proj.weight", f"{EXPERTS}.gate_up_proj"} <= names
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    with torch.no_grad():
        states = load(source, AutoModel)(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(again.lm_head(states), logits(model))
    plain = again.dequantize()
    assert plain.get_parameter(f"{EXPERTS}.gate_up_proj").shape[0] == 4
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    tiny_names = load_file(tmp_path / "plain/model.safetensors").keys()
    mixture(plain.config.model_type).save_pretrained(tmp_path / "dense")
    assert tiny_names == load_file(tmp_path / "dense/model.safetensors").keys(), "the architecture's own"
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))


def test_experts_that_no_spec_names_stay_fused(tmp_path):
    """A folder of before, or one whose experts were ignored."""
    name = "model.layers.0.self_attn.o_proj"
    model = attach(mixture(), {name: spec("factors", 32, 32, 5)}, PROVENANCE)
    randomise(model.get_submodule(name))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.get_submodule(EXPERTS)).__name__ == "MixtralExperts"
    torch.testing.assert_close(logits(again), logits(model))


def test_without_drank_such_a_folder_does_not_load(folder):
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "try: AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: assert 'ignore_mismatched_sizes' in str(error) or 'CONVERSION' in str(error)\n"
        "else: raise SystemExit('loaded without drank')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dense_expert_that_a_folder_lacks_is_missed(folder, tmp_path):
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{EXPERTS}.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"layers.1.mlp.experts.3.up_proj.weight is in no weight file"):
        load(tmp_path)


def test_a_spec_that_fits_no_expert_leaves_the_model_as_it_was():
    model = mixture()
    with pytest.raises(FormatError, match="65 x 32"):
        attach(model, {f"{EXPERTS}.0.up_proj": spec("factors", 65, 32, 5)}, PROVENANCE)
    assert type(model.get_submodule(EXPERTS)).__name__ == "MixtralExperts"
