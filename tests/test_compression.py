"""Ranks into a model: the written weights, both storages, saving and loading, units that cannot be stored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import drank.language_model.plugin  # noqa: F401
from drank.compression import UnsafePivotError, compress, module_specs
from drank.language_model.linears import find_linears
from drank.spectrum import whitened_spectrum
from tests import tiny

IDS = torch.arange(12)[None]


def units(model, form, rank):
    return [
        {"name": x.name, "form": form, "rank": rank, "out_features": x.out_features, "in_features": x.in_features}
        for x in find_linears(model, ["re:.*"])
    ]


def factors_of(model):
    spectra = {x.name: whitened_spectrum(x.weight.detach().float()) for x in find_linears(model, ["re:.*"])}
    return lambda name, k: (spectra[name].output_vectors[:k], spectra[name].input_vectors[:k])


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_full_rank_but_one_stays_close_and_the_reloaded_model_has_the_same_logits(build, form, tmp_path):
    model = build()
    specs = module_specs(units(model, form, 15))
    read = factors_of(model)
    expected = {name: read(name, 15)[0].T @ read(name, 15)[1] for name in specs}
    compress(model, specs, read, {"variant": "test"})
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).dense_weight(), weight, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.quantization_config.provenance == {"variant": "test"}


def test_nothing_to_compress_leaves_a_plain_model():
    model = tiny.llama()
    before = model(IDS).logits
    assert compress(model, module_specs(units(model, "dense", 16)), factors_of(model), {}) is model
    assert torch.equal(model(IDS).logits, before)
    assert not hasattr(model.config, "quantization_config")


def test_a_unit_whose_pivot_coefficients_pass_the_limit_is_refused_by_name(monkeypatch):
    # Pivoted QR keeps real coefficients near 1, so the limit is lowered rather than a matrix contrived.
    monkeypatch.setattr("drank.compression.LARGEST_COEFFICIENT", 1e-3)
    model = tiny.llama()
    name = "model.layers.0.self_attn.q_proj"
    specs = module_specs([{"name": name, "form": "pivot", "rank": 2, "out_features": 32, "in_features": 32}])
    with pytest.raises(UnsafePivotError, match=f"{name}: pivot coefficients reach .* use storage 'factors'"):
        compress(model, specs, factors_of(model), {})
