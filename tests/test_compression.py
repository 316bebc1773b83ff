"""Ranks into a model: the written weights, both storages, groups, removed channels, units that cannot be stored."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from drank.method.channels import remove_channels
from drank.method.pivot import pivot_rows
from drank.method.spectrum import factors, whitened_spectrum
from drank.model import quantizer
from drank.model.format import parse
from drank.model.groups import find_groups, find_mlps
from drank.model.linears import find_linears
from drank.steps.compression import UnsafePivotError, compress
from tests import tiny

IDS = torch.arange(12)[None]


def row(members, form, rank):
    first = members[0]
    return {
        "name": first.name, "members": [m.name for m in members], "factors": first.name, "role": first.role,
        "form": form, "rank": rank,
        "out_features": sum(m.out_features for m in members), "in_features": first.in_features,
    }  # fmt: skip


def units(model, form, rank):
    return [row((x,), form, rank) for x in find_linears(model, ["re:.*"])]


def weight_of(members):
    return torch.cat([m.weight.detach().float() for m in members])


def slices_of(groups):
    """left and right of the rank-k slice, from weights as they are now."""
    weights = {group[0].name: weight_of(group).clone() for group in groups}
    return lambda name, k: factors(weights[name], **whitened_spectrum(weights[name]).rows(k))


class Spectra(dict):
    """The store of the step ``spectrum``, in memory."""

    def rows(self, name, k):
        return self[name].rows(k)


def vectors_of(groups):
    return Spectra({f"factors/{group[0].name}": whitened_spectrum(weight_of(group)) for group in groups})


def singles(model):
    return [(x,) for x in find_linears(model, ["re:.*"])]


def renumber(mlps, weights, read, k, biases=()):
    """Channels of MLPs whose matrices are all in pivot form are numbered as the first one computes them."""
    for mlp in mlps:
        left, right = read(mlp.before[0].name, k)
        order = pivot_rows(left, right).order.long()
        for linear in mlp.before:
            weights[linear.name] = weights[linear.name][order]
            if linear.name in biases:
                biases[linear.name] = biases[linear.name][order]
        weights[mlp.down.name] = weights[mlp.down.name][:, order]


def reloaded(model, folder):
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    return loaded


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_full_rank_but_one_stays_close_and_the_reloaded_model_has_the_same_logits(build, form, tmp_path):
    model = build()
    sliced = slices_of(singles(model))
    rows = units(model, form, 15)
    expected = {unit["name"]: torch.mm(*sliced(unit["name"], 15)) for unit in rows}
    if form == "pivot":
        renumber(find_mlps(model, find_linears(model, ["re:.*"])), expected, sliced, 15)
    compress(model, rows, vectors_of(singles(model)), {"variant": "test"})
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).dense_weight(), weight, rtol=1e-4, atol=1e-5)
    loaded = reloaded(model, tmp_path)
    assert loaded.config.quantization_config.provenance == {"variant": "test"}


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_a_group_stores_its_basis_once_and_is_the_slice_of_the_stack(form, tmp_path):
    model = tiny.llama()
    groups = find_groups(find_linears(model, ["q_proj", "gate_proj"]), 2, even_with_grouped_heads=True)
    sliced = slices_of(groups)
    expected = {}
    for group in groups:
        left, right = sliced(group[0].name, 9)
        parts = (left @ right).split(group[0].out_features)
        expected |= {member.name: part for member, part in zip(group, parts, strict=True)}
    compress(model, [row(group, form, 9) for group in groups], vectors_of(groups), {})
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(name).dense_weight(), weight, rtol=1e-4, atol=1e-5)
    loaded = reloaded(model, tmp_path)
    first, second = (loaded.get_submodule(f"model.layers.{layer}.mlp.gate_proj") for layer in (0, 1))
    basis = (lambda m: m.basis) if form == "factors" else (lambda m: m.basis.weight)
    assert basis(first).data_ptr() == basis(second).data_ptr()
    stored = sum(p.numel() for p in {id(p): p for m in (first, second) for p in m.parameters()}.values())
    assert stored == 9 * (2 * 64 + 32 - (9 if form == "pivot" else 0))


@pytest.mark.parametrize("form", ["dense", "factors", "pivot"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_an_mlp_that_lost_channels_is_really_smaller_and_keeps_its_biases(build, form, tmp_path):
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    linears = find_linears(model, ["re:.*"])
    mlp = find_mlps(model, linears)[1]
    n_out, n = mlp.down.out_features, mlp.n_channels
    (cut,) = remove_channels(weight_of([mlp.down]), torch.eye(n), torch.eye(n_out), [n - 20])
    weights = {linear.name: weight_of([linear])[cut.alive] for linear in mlp.before} | {mlp.down.name: cut.down.float()}
    biases = {linear.name: getattr(linear.module, "bias", None) for linear in mlp.before}
    expected_bias = {name: bias.detach()[cut.alive].clone() for name, bias in biases.items() if bias is not None}
    spectra = {name: whitened_spectrum(weight) for name, weight in weights.items()}
    rows = []
    for linear in (*mlp.before, mlp.down):
        out_features, in_features = weights[linear.name].shape
        sizes = {"out_features": out_features, "in_features": in_features}
        rows.append(row((linear,), form, 12) | sizes)

    slices = {name: factors(weight, **spectra[name].rows(12)) for name, weight in weights.items()}
    stored = Spectra({f"factors/{name}": spectrum for name, spectrum in spectra.items()})
    stored[f"cuts/{mlp.name}.{n - 20}"] = {"alive": cut.alive, "down": cut.down.float()}
    compress(model, rows, stored, {})
    loaded = reloaded(model, tmp_path)
    if form != "dense":
        weights = {name: left @ right for name, (left, right) in slices.items()}
    if form == "pivot":
        renumber([mlp], weights, lambda name, _: slices[name], 12, expected_bias)
    for name, weight in weights.items():
        module = loaded.get_submodule(name)
        if form == "dense":
            held = module.weight.T if build is tiny.gpt2 else module.weight
            torch.testing.assert_close(held, weight)
        else:
            torch.testing.assert_close(module.dense_weight(), weight, rtol=1e-4, atol=1e-5)
        if name in expected_bias:
            assert torch.equal(module.bias, expected_bias[name])


def test_nothing_to_compress_leaves_a_plain_model():
    model = tiny.llama()
    before = model(IDS).logits
    assert compress(model, units(model, "dense", 16), vectors_of(singles(model)), {}) is model
    assert torch.equal(model(IDS).logits, before)
    assert not hasattr(model.config, "quantization_config")


def test_a_unit_whose_pivot_coefficients_pass_the_limit_is_refused_by_name(monkeypatch):
    # Pivoted QR keeps real coefficients near 1, so the limit is lowered rather than a matrix contrived.
    monkeypatch.setattr("drank.steps.compression.LARGEST_COEFFICIENT", 1e-3)
    model = tiny.llama()
    linear = find_linears(model, ["layers.0.self_attn.q_proj"])[0]
    with pytest.raises(UnsafePivotError, match=f"{linear.name}: pivot coefficients reach .* use storage 'factors'"):
        compress(model, [row((linear,), "pivot", 2)], vectors_of([(linear,)]), {})


def test_a_matrix_of_zeros_is_stored_as_one_row_of_zeros(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    zero = find_linears(model, ["layers.0.self_attn.q_proj"])
    compress(model, [row(zero, "pivot", 1)], vectors_of([tuple(zero)]), {})
    assert not reloaded(model, tmp_path).model.layers[0].self_attn.q_proj.dense_weight().any()


def test_specs_are_parsed_once_per_compression_and_saving(tmp_path, monkeypatch):
    model, parsed = tiny.llama(), []
    monkeypatch.setattr(quantizer, "parse", lambda section: parsed.append(section) or parse(section))
    rows = [row(linear, "pivot", 9) for linear in singles(model)]
    compress(model, rows, vectors_of(singles(model)), {}).save_pretrained(tmp_path)
    assert len(parsed) == 1
