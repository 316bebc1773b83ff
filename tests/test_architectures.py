"""Every decoder through every stage: architectures times kinds of units and storage, on tiny random models.

The stages run as functions in this process; what they write is reloaded by plain from_pretrained and audited. Other
allocation rules and metrics see the same matrices, so one architecture is enough for them (test_presets).
"""

import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from stages import allocation, compression, covariance, evaluation, raw, release, sampling, spectrum
from transformers import AutoModelForCausalLM

import drank.model.quantizer  # noqa: F401
from drank.audit import audit
from drank.model.experts import fused_experts, unfuse
from drank.model.linears import UnreachedError, find_linears
from drank.project.files import read_json
from tests import tiny

# Fused matrices, biases, norms in other places, Conv1D, and experts, whose weights stay as they are.
MIXTURES = "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"
ARCHITECTURES = "llama", "qwen2", "gemma3_text", "phi3", "opt", "gpt2", "gpt_neox", "olmo2", *MIXTURES
SPECTRA = {
    "input-pairs": {"metric": "input", "units": "group", "layers": 2, "even_with_grouped_heads": True},
    "kfac": {"metric": "kfac", "units": "block", "damping": 1e-4, "cuts": [0.0, 0.25, 0.5]},
    "kfac-pairs": {
        "metric": "kfac", "units": "group", "layers": 2, "even_with_grouped_heads": True, "damping": 1e-4,
    },
}  # fmt: skip
PRESETS = {
    "basis-sharing": {"spectrum": "input-pairs", "allocation": "uniform", "storage": "factors"},
    "kfac": {"spectrum": "kfac", "allocation": "least_loss", "storage": "pivot"},
    "pairs-pivot": {"spectrum": "kfac-pairs", "allocation": "least_loss", "storage": "pivot"},
}
DENSE = {"spectrum": "kfac-pairs", "allocation": "dense", "storage": "factors"}
IDS = torch.arange(3, 23)[None]


def write_params(root, **changes):
    document = yaml.safe_load(tiny.PARAMS)
    document["sampling"] |= {"n_windows": 4, "window_length": 32}
    document["spectrum"] = {name: {"calibration_seed": 0} | asked for name, asked in SPECTRA.items()}
    document["presets"] = PRESETS | {"dense": DENSE}
    document["variants"] = {
        f"{name}-{percent}": {"preset": name, "spectrum": preset["spectrum"], "size_ratio": percent / 100}
        for name, preset in PRESETS.items()
        for percent in (70, 98)
    } | {"dense": {"preset": "dense", "spectrum": "kfac-pairs", "size_ratio": 1.0}}
    document["evaluation"]["tasks"] = []
    document["covariance"] |= changes
    (root / "params.yaml").write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Texts and windows, which all architectures share, having one tokenizer."""
    root = tmp_path_factory.mktemp("sampled") / "project"
    tiny.project(root)
    write_params(root)
    raw.main(root)
    sampling.main(root)
    return root


def with_model(sampled, root, model, **changes):
    shutil.copytree(sampled, root)
    write_params(root, **changes)
    model.to(torch.bfloat16).save_pretrained(root / "source/model")
    raw.main(root)
    return root


@pytest.fixture(scope="module", params=ARCHITECTURES)
def project(request, sampled, tmp_path_factory):
    """A project with that model and all its factors."""
    model = tiny.decoder(request.param)
    root = with_model(sampled, tmp_path_factory.mktemp(request.param) / "project", model)
    covariance.main("0", root)
    for key in SPECTRA:
        spectrum.main(key, root)
    return root


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def without_biases(model):
    """Channels that an MLP loses take their biases with them, which no price counts."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.endswith("bias"))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("preset", PRESETS)
def test_an_architecture_with_a_preset_is_as_large_as_allocated_reloads_and_passes_an_audit(project, preset, tmp_path):
    variant = f"{preset}-70"
    for stage in (allocation, compression, evaluation, release):
        stage.main(variant, project)
    found = read_json(project / f"data/allocation/{variant}.json")
    dense, model = load(project / "data/raw/model"), load(project / f"data/models/{variant}")
    assert found["price"] <= found["budget"]
    unfuse(dense, fused_experts(dense))
    starved = [row["parameters"] for row in found["left_dense"] if "an expert that saw" in row["reason"]]
    linears = sum(linear.weight.numel() for linear in find_linears(dense, ["re:.*"]))
    assert linears == found["targeted_parameters"] + sum(starved)
    left = sum(row["parameters"] for row in found["left_dense"])
    assert left + found["targeted_parameters"] == dense.num_parameters(), "every parameter is in one of the two"
    assert without_biases(dense) - without_biases(model) == found["targeted_parameters"] - found["price"]
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.isfinite(logits(model)).all()
    assert_holds(project / f"data/models/{variant}")


def assert_holds(folder):
    links = {link.name: link for link in audit(folder, None).links}
    assert links.pop("dvc.lock").finding == "cannot be checked here"
    assert [link for link in links.values() if link.finding != "holds"] == []


def test_a_dense_variant_is_the_base_model_and_passes_an_audit(project):
    """Tensors of some, such as the experts of a Mixtral, have the names of older checkpoints there."""
    for stage in (allocation, compression, evaluation, release):
        stage.main("dense", project)
    folder = project / "data/models/dense"
    assert_holds(folder)
    assert (folder / "model.safetensors").read_bytes() == (project / "data/raw/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["kfac", "pairs-pivot"])
def test_an_architecture_that_keeps_nearly_everything_is_nearly_the_dense_model(project, preset):
    variant = f"{preset}-98"
    allocation.main(variant, project)
    compression.main(variant, project)
    dense, model = load(project / "data/raw/model"), load(project / f"data/compression/{variant}")
    found, expected = logits(model), logits(dense)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    plain = logits(model.dequantize())
    assert float((plain - found).norm() / found.norm()) < 0.02, "but for bfloat16"


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        ("mamba", "no token went through backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj"),
        ("doge", "no gradient came back to model.layers.0.self_attn.dt_proj"),
    ],
)
def test_what_calibration_cannot_see_is_refused_with_patterns_that_mend_it(architecture, told, sampled, tmp_path):
    root = with_model(sampled, tmp_path / "project", tiny.decoder(architecture))
    with pytest.raises(UnreachedError, match=told) as error:
        covariance.main("0", root)
    assert not (root / "data/covariance/0").exists()
    write_params(root, ignore=yaml.safe_load(str(error.value).partition("covariance.ignore: ")[2]))
    covariance.main("0", root)
    left = {row["name"]: row["reason"] for row in read_json(root / "data/covariance/0/summary.json")["left_dense"]}
    assert [name for name, reason in left.items() if reason.startswith("ignored: re:") and "dt_proj" in name]


def test_tensors_have_the_names_of_their_modules_where_older_checkpoints_had_others(sampled, tmp_path):
    """transformers saves a `shared_expert` and loads `shared_experts`, for laguna, if nothing is done about it."""
    root = with_model(sampled, tmp_path / "project", tiny.decoder("laguna"))
    name = "model.layers.1.mlp.shared_expert.up_proj.weight"
    assert name in safetensors_names(root / "data/raw/model")
    covariance.main("0", root)
    spectrum.main("kfac", root)
    allocation.main("kfac-70", root)
    compression.main("kfac-70", root)
    folder = root / "data/compression/kfac-70"
    model = load(folder)
    assert name.replace("shared_expert", "shared_experts") in safetensors_names(folder)
    model.save_pretrained(tmp_path / "again")
    assert safetensors_names(tmp_path / "again") == safetensors_names(folder)
    plain = model.dequantize()
    plain.save_pretrained(tmp_path / "plain")
    assert name in safetensors_names(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))


def safetensors_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
