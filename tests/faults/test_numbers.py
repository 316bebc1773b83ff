"""Degenerate numbers through the real stages: a result that is defined, or an error that names the place."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from stages import allocation, compression, covariance, evaluation, sampling, spectrum
from transformers import AutoModelForCausalLM

from drank.method.covariance import NotFiniteError
from drank.model.linears import UnreachedError
from drank.model.perplexity import NotFiniteLossError
from drank.model.text import SamplingError
from drank.model.vocabulary import TokenError
from drank.project.files import read_json

LAST = "model.layers.1.mlp.down_proj"
STORAGES = ("factors", "pivot")


def put(value, *names):
    """Spoil the first number of tensors."""

    def spoil(weights):
        for name in names:
            weights[name].view(-1)[0] = value

    return spoil


def zeros(weights):
    weights[f"{LAST}.weight"].zero_()


def one_direction(weights):
    """Every token has the same embedding, but for its length: all that enters layer 0 is one vector."""
    embedding = weights["model.embed_tokens.weight"]
    embedding[:] = embedding[:1]


def rank_one(weights):
    weight = weights[f"{LAST}.weight"]
    weight[:] = weight[:, :1] * weight[:1]


def enormous_gradients(weights):
    weights["model.norm.weight"].fill_(1e30)


@pytest.fixture
def root(reproduced, tmp_path):
    """Without dvc.lock, by which every stage would name what was changed here as damage."""
    root = tmp_path / "project"
    ignored = shutil.ignore_patterns(".dvc", "dvc.lock", ".git", "source", "figures", "models")
    shutil.copytree(reproduced, root, ignore=ignored)
    return root


def change_weights(root, change):
    file = root / "data/raw/model/model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def without_gradients(root):
    """The same project with plain covariances, in bfloat16, and one variant of single matrices for each storage."""
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["covariance"]["fisher"] = "none"
    # Products of bfloat16 numbers are exact in float32, so a covariance of one direction has no rounding beside it.
    document["compute"]["dtype"] = "bfloat16"
    del document["spectrum"]["kfac"]
    plain = {"spectrum": "input", "allocation": "uniform"}
    document["presets"] = {name: plain | {"storage": name} for name in STORAGES} | {
        "dense": document["presets"]["dense"]
    }
    variants = {name: {"preset": name, "spectrum": "input", "size_ratio": 0.8} for name in STORAGES}
    document["variants"] = {"dense": document["variants"]["dense"]} | variants
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def factorised(root, name):
    """The row of a matrix in the summary of its spectrum; every compressed model has finite logits."""
    spectrum.main("input", root)
    for storage in STORAGES:
        allocation.main(storage, root)
        compression.main(storage, root)
        model = AutoModelForCausalLM.from_pretrained(root / "data/compression" / storage)
        assert torch.isfinite(model(torch.arange(64)[None]).logits).all()
    (row,) = [row for row in read_json(root / "data/spectrum/input/summary.json")["units"] if row["name"] == name]
    return row


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            put(torch.nan, "model.layers.0.self_attn.v_proj.weight"),
            NotFiniteError,
            "entering model.layers.0.self_attn.o",
        ),
        (put(torch.inf, "model.layers.0.mlp.up_proj.weight"), NotFiniteError, "entering model.layers.0.mlp.down_proj"),
        (put(torch.nan, f"{LAST}.weight"), NotFiniteError, "gradients leaving model.layers.0"),
        (put(1e30, "model.layers.1.post_attention_layernorm.weight"), NotFiniteError, "entering model.layers.1.mlp"),
        (enormous_gradients, NotFiniteError, "gradients leaving model.layers.0"),
        (zeros, UnreachedError, "no gradient came back to model.layers.1.mlp"),
    ],
    ids=["nan", "infinity", "nan at the end", "overflow when squared", "overflow in the backward pass", "zeros"],
)
def test_covariance_names_where_numbers_stop_being_numbers(root, change, error, message):
    change_weights(root, change)
    with pytest.raises(error, match=message):
        covariance.main("0", root)


def test_a_weight_that_no_covariance_sees_is_named_by_the_spectrum_and_by_evaluation(root):
    without_gradients(root)
    change_weights(root, put(torch.nan, f"{LAST}.weight"))
    covariance.main("0", root)
    with pytest.raises(NotFiniteError, match=f"{LAST}: 1 of 2048 entries of the weight are NaN"):
        spectrum.main("input", root)
    compression.main("dense", root)
    with pytest.raises(NotFiniteLossError, match="window 0: the loss is nan"):
        evaluation.main("dense", root)


@pytest.mark.parametrize(
    ("change", "file", "discarded"),
    [
        (zeros, LAST, 31),
        (rank_one, LAST, None),  # in bfloat16 nearly rank one: the rounding is small but there
        (one_direction, "model.layers.0.self_attn.q_proj", 31),
    ],
    ids=["zero matrix", "rank one", "constant activations"],
)
def test_degenerate_matrices_go_through_and_what_was_discarded_is_told(root, change, file, discarded):
    without_gradients(root)
    change_weights(root, change)
    covariance.main("0", root)
    row = factorised(root, file)
    assert row["n_discarded"] == discarded or discarded is None
    assert row["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_a_covariance_of_condition_1e30_gives_finite_factors_and_tells_what_it_discards(root):
    """Diagonal, so that float32 holds it exactly; of 1e-300 it holds zeros."""
    without_gradients(root)
    covariance.main("0", root)
    file = root / f"data/covariance/0/inputs/{LAST}.safetensors"
    stored = load_file(file)
    for exponent, scale in ((-30, 1.0), (-30, 1e30), (-300, 1.0)):
        values = torch.logspace(0, exponent, len(stored["covariance"]), dtype=torch.float64) * scale
        save_file(stored | {"covariance": torch.diag(values.float())}, file)
        row = factorised(root, LAST)
        factors = load_file(root / f"data/spectrum/input/factors/{LAST}.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in factors.values())
        kept = load_file(root / "data/spectrum/input/singular_values.safetensors")[LAST]
        assert row["n_discarded"] == 32 - len(kept) > 0
        assert 1 <= row["effective_rank"] <= 3


def test_a_token_id_that_the_model_lacks_and_a_text_of_one_token_are_named(root):
    file = root / "data/sampling/calibration/0.safetensors"
    windows = load_file(file)["windows"]
    windows[3, 5] ^= 1 << 30
    save_file({"windows": windows}, file)
    with pytest.raises(TokenError, match=r"data/sampling/calibration: holds token id 10\d{8}, .* 0 to 319"):
        covariance.main("0", root)
    (root / "data/raw/text/commons.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SamplingError, match="commons"):
        sampling.main(root)
