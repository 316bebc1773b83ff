"""Every shipped preset, and a user's own, through the stages on a tiny model: sizes, sharing, reload, release."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from experiments.tools.depth import app as tool
from experiments.tools.depth import trial
from safetensors.torch import load_file, save_file
from stages import allocation, compression, covariance, evaluation, raw, release, sampling, spectrum
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import drank.model.quantizer  # noqa: F401
from drank.audit import audit
from drank.model.divergence import token_divergence
from drank.model.linears import find_linears
from drank.project.files import read_json
from drank.project.params import read_params
from drank.steps.evaluation import count_parameters
from tests import tiny
from tests.conftest import REPOSITORY
from tests.test_audit import edit, more, reseal

SHIPPED = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
SPECTRA = {
    "none": {"metric": "none", "units": "matrix"},
    "diagonal": {"metric": "diagonal", "units": "matrix", "alpha": 0.5},
    "measured": {
        "metric": "diagonal", "units": "matrix", "alpha": 0.5,
        "sensitivity_windows": 2, "sensitivity_ratios": [0.3, 0.6],
    },
    "input": {"metric": "input", "units": "matrix"},
    "input-pairs": {"metric": "input", "units": "group", "layers": 2, "even_with_grouped_heads": True},
    "kfac": {"metric": "kfac", "units": "block", "damping": 1e-4, "cuts": [0.0, 0.25, 0.5]},
    "kfac-bits": {
        "metric": "kfac", "units": "block", "damping": 1e-4, "cuts": [0.0, 0.25, 0.5], "bits": [3, 4, 8],
        "group_size": 128,
    },
    "kfac-svd": {
        "metric": "kfac_clipped", "units": "matrix", "damping": 0.111111, "gradient_damping": 0.428571,
        "sensitivity_windows": 2, "sensitivity_ratios": [0.1], "sensitivity_scores": "divergence",
    },
    "kfac-pairs": {
        "metric": "kfac", "units": "group", "layers": 2, "even_with_grouped_heads": True, "damping": 1e-4,
    },
}  # fmt: skip
OWN = {
    "asvd-perplexity": {
        "spectrum": "measured", "allocation": "sensitivity", "scores": "perplexity", "storage": "factors",
    },
    "pairs-pivot": {"spectrum": "kfac-pairs", "allocation": "least_loss", "storage": "pivot"},
    "blocks-factors": {"spectrum": "kfac", "allocation": "least_loss", "storage": "factors", "multiple_of": 4},
    "pairs-factors-4": {
        "spectrum": "input-pairs", "allocation": "uniform", "storage": "factors", "precision": 4, "group_size": 16,
    },
    "pairs-pivot-3": {"spectrum": "kfac-pairs", "allocation": "least_loss", "storage": "pivot", "precision": 3},
    "svd-2": {"spectrum": "none", "allocation": "uniform", "storage": "factors", "precision": 2, "rounding": "nearest"},
}  # fmt: skip
PRESETS = {name: p for name, p in SHIPPED["presets"].items() if name != "dense"} | OWN
for preset in PRESETS.values():  # ranks of the tiny model are below 32
    preset |= {"multiple_of": 4} if "multiple_of" in preset else {}
SIZES = {"mixed": {"bytes_ratio": 0.35}}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny model with all its factors, and a variant of every preset at 0.6."""
    root = tmp_path_factory.mktemp("presets")
    tiny.project(root)
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["spectrum"] = {name: {"calibration_seed": 0} | spectrum for name, spectrum in SPECTRA.items()}
    document["presets"] = PRESETS
    document["variants"] = {
        name: {"preset": name, "spectrum": preset["spectrum"], **SIZES.get(name, {"size_ratio": 0.6})}
        for name, preset in PRESETS.items()
    }
    document["evaluation"]["tasks"] = []
    document["covariance"] |= {"gradient_clip": [0.1, 10.0], "gradient_margin": 0.125}
    (root / "params.yaml").write_text(yaml.safe_dump(document))
    raw.main(root)
    sampling.main(root)
    covariance.main("0", root)
    for key in SPECTRA:
        spectrum.main(key, root)
    return root


def allocated(project, preset):
    allocation.main(preset, project)
    return read_json(project / f"data/allocation/{preset}.json")


def made(project, preset):
    """The allocation of a variant, whose folder is released."""
    found = allocated(project, preset)
    for stage in (compression, evaluation, release):
        stage.main(preset, project)
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fits_its_budget_and_its_folder_holds_what_was_allocated_and_passes_an_audit(project, preset):
    found = made(project, preset)
    assert found["price"] <= found["budget"]
    assert found["price"] == sum(unit["price"] for unit in found["units"])
    assert found["objective"]["bound"] <= found["objective"]["value"]
    model = AutoModelForCausalLM.from_pretrained(project / f"data/models/{preset}")
    dense = AutoModelForCausalLM.from_pretrained(project / "data/raw/model")
    targeted = sum(linear.weight.numel() for linear in find_linears(dense, ["re:.*"]))
    assert targeted == found["targeted_parameters"]
    saved = count_parameters(dense) - count_parameters(model)
    assert saved == targeted - found["price"], "shared bases count once, indices are no parameters"
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
    if "precision" in PRESETS[preset]:
        bits = {unit["bits"] for unit in found["units"]}
        assert bits <= {3, 4, 8, 16} if preset == "mixed" else bits == {PRESETS[preset]["precision"]}
        assert found["bytes"] == sum(unit["bytes"] for unit in found["units"])
    states = {link.name: link.finding for link in audit(project / f"data/models/{preset}", None).links}
    assert states.pop("dvc.lock") == "cannot be checked here"
    assert set(states.values()) == {"holds"}, states


@pytest.mark.parametrize(
    ("link", "file", "keys", "value", "told"),
    [
        ("ranks", "allocation.json", "units.0.bits", 3, "but dense of rank 32 in 3 bits has 512"),
        ("ranks", "allocation.json", "units.0.bytes", more, "bytes of model.layers.0"),
        ("ranks", "allocation.json", "group_size", 32, ""),
        ("sizes", "allocation.json", "bytes", more, "bytes of allocation.json"),
        ("parameters", "allocation.json", "precision", 3, "precision of allocation.json is 3"),
        ("ranks", "allocation.json", "embedding_bits", 4, "bits of model.embed_tokens is 8"),
        ("ranks", "config.json", "quantization_config.modules.*.bits", 5, ""),
        ("ranks", "model.safetensors", "model.layers.0.mlp.up_proj.weight", torch.int8, "is I8, but 4 bits has U8"),
        ("ranks", "model.safetensors", "model.layers.0.mlp.up_proj.weight_scales", torch.float32, "is F32, but 4 bits"),
        ("ranks", "model.safetensors", "model.embed_tokens.weight", torch.uint8, "is U8, but 8 bits has I8"),
    ],
)
def test_an_audit_finds_bits_that_are_not_those_of_the_folder(project, tmp_path, link, file, keys, value, told):
    if not (project / "data/models/gptq-4").exists():
        made(project, "gptq-4")
    folder = Path(shutil.copytree(project / "data/models/gptq-4", tmp_path / "delivered"))
    if file == "model.safetensors":
        weights = load_file(folder / file)
        (folder / file).unlink()
        save_file(weights | {keys: weights[keys].to(value)}, folder / file, {"format": "pt"})
    else:
        edit(folder / file, keys, value)
    reseal(folder)
    broken = {found.name: found.detail for found in audit(folder, None).broken}
    assert told in broken[link]


def test_groups_of_two_layers_name_their_members(project):
    units = allocated(project, "basis-sharing")["units"]
    pairs = [unit for unit in units if len(unit["members"]) == 2]
    assert {unit["kind"] for unit in pairs} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    gate = next(unit for unit in pairs if unit["kind"] == "gate_proj")
    assert gate["members"] == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
    assert gate["rank"] == int(0.6 * 128 * 32 / (128 + 32))


def test_blocks_say_how_many_channels_they_kept(project):
    found = allocated(project, "kfac")
    assert [block["full_channels"] for block in found["blocks"]] == [64, 64]
    for block in found["blocks"]:
        units = [u for u in found["units"] if block["name"] in u["name"]]
        shapes, m = {u["kind"]: (u["out_features"], u["in_features"]) for u in units}, block["channels"]
        assert shapes == {"gate_proj": (m, 32), "up_proj": (m, 32), "down_proj": (32, m)}
        assert (block["loss"] == 0) == (m == 64)


def test_measured_divergences_are_positive_and_no_perplexities(project):
    summary = json.loads((project / "data/spectrum/kfac-svd/summary.json").read_text())
    assert "sensitivity" not in summary
    assert len(summary["divergence"]) == 14
    assert all(set(row) == {"0.1"} and 0 < row["0.1"] < 1 for row in summary["divergence"].values())


def test_weights_of_depth_are_tried_on_the_model_that_the_stages_build(project):
    allocated(project, "lems")
    compression.main("lems", project)
    windows = load_file(project / "data/sampling/calibration/0.safetensors")["windows"][-2:]
    dense, lems = (
        AutoModelForCausalLM.from_pretrained(project / f"data/{f}") for f in ("raw/model", "compression/lems")
    )
    measure = trial(read_params(project / "params.yaml"), "lems", 2, project)
    assert measure(5.0, 0.0) == pytest.approx(token_divergence(dense, lems, windows), rel=0.05)
    done = CliRunner().invoke(tool, ["lems", "--trials", "2", "--windows", "2", "--root", str(project)])
    *tried, best = done.output.strip().splitlines()
    nats = {line.split("  ")[0]: float(line.split()[-4]) for line in tried}
    assert len(nats) == 2
    assert best == f"best: {min(nats, key=nats.__getitem__)}".strip()
    assert "no other allocation than lems" in str(CliRunner().invoke(tool, ["svd", "--root", str(project)]).exception)


def test_measured_sensitivities_are_perplexities_above_the_dense_ones(project):
    scores = read_json(project / "data/spectrum/measured/summary.json")["sensitivity"]
    assert len(scores) == 14
    assert all(set(row) == {"0.3", "0.6"} and min(row.values()) > 1 for row in scores.values())
