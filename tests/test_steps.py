"""The steps one after the other, on dicts: a random model, without DVC, stages or a folder of data."""

import numpy as np
import pytest
import torch

from drank.method.covariance import clipped
from drank.method.metrics import damped
from drank.method.precisions import Grid
from drank.method.rounding import expected_loss
from drank.method.spectrum import whitened_spectrum
from drank.model.capture import run_batches, split_windows, watching_output_gradients
from drank.project.params import read_params
from drank.project.processes import Group
from drank.steps.allocation import allocation, table
from drank.steps.compression import compress
from drank.steps.covariance import UnevenTokensError, collect
from drank.steps.spectrum import factorise
from tests import tiny


class Store(dict):
    """A TensorFolder in memory."""

    def rows(self, name, k):
        return {key: tensor[:k] for key, tensor in self[name].items()}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    file = tmp_path_factory.mktemp("params") / "params.yaml"
    file.write_text(tiny.PARAMS)
    return read_params(file)


def windows():
    return torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def covariances(params):
    store, model = Store(), tiny.llama()
    return store, collect(model, windows(), params.covariance, Group(), store, {})


def factored(params, key, covariances):
    store, asked = Store(), params.spectrum[key]
    return store, factorise(tiny.llama(), asked, params.covariance, *covariances, windows(), Group(), store)


@pytest.mark.parametrize("variant", ["svd-llm-80", "d-rank-80", "kfac-80"])
def test_a_model_is_compressed_within_its_budget_and_predicts_about_the_same(params, covariances, variant):
    asked, preset = params.variant(variant)
    store, summary = factored(params, asked.spectrum, covariances)
    values = {name: s.numpy() for name, s in store["singular_values"].items()}
    document = allocation(variant, asked, preset, values, summary)
    assert document["price"] <= document["budget"] == int(0.8 * document["targeted_parameters"])
    assert len(table(document["units"]).splitlines()) == 1 + len(document["units"]) == 15
    dense, model = tiny.llama(), compress(tiny.llama(), document["units"], store, {"variant": variant})
    assert model.config.quantization_config.provenance == {"variant": variant}
    before, after = (tiny.token_perplexity(m, windows(), 4)[0] for m in (dense, model))
    assert after == pytest.approx(before, rel=0.02)


def test_the_summary_of_a_spectrum_describes_every_file_of_its_store(params, covariances):
    store, summary = factored(params, "kfac", covariances)
    rows = summary["units"] + [m for b in summary["blocks"] for cut in b["cuts"] for m in cut["matrices"]]
    assert {f"factors/{row['factors']}" for row in rows} == {name for name in store if name.startswith("factors/")}
    for row in rows:
        held = store[f"factors/{row['factors']}"]["vectors"]
        assert held.shape == (
            len(store["singular_values"][row["factors"]]),
            min(row["out_features"], row["in_features"]),
        )
    cuts = {f"cuts/{block['name']}.{n}" for block in summary["blocks"] for n in (48, 32)}
    assert {name for name in store if name.startswith("cuts/")} == cuts


def test_losses_of_rounding_are_those_of_the_matrices_that_are_left(params, covariances):
    """In the unit of dropped energies, which are twice the nats; all else is as it is without bits."""
    asked = params.spectrum["kfac"].model_copy(update={"bits": (2, 4), "group_size": 16})
    with_bits = params.model_copy(update={"spectrum": {"kfac": asked}})
    (store, summary), (_, plain) = (factored(p, "kfac", covariances) for p in (with_bits, params))
    model = tiny.llama()
    n_linears = sum(block["channels"] * 3 * model.config.hidden_size for block in summary["blocks"])
    n_linears += sum(row["out_features"] * row["in_features"] for row in summary["units"])
    embeddings = model.get_input_embeddings().weight
    assert summary["rest"]["embeddings"] == [list(embeddings.shape)]
    assert summary["rest"]["others"] == model.num_parameters() - n_linears - embeddings.numel()
    for block in summary["blocks"]:
        down, inputs, outputs = (block["cuts"][1]["matrices"][i] for i in (2, 0, 1))
        cut = store[f"cuts/{block['name']}.{down['in_features']}"]
        for row, inside in ((down, True), (inputs, False), (outputs, False)):
            weight = model.get_submodule(row["name"]).weight.detach()
            H = damped(covariances[0][f"inputs/{covariances[1]['owners'][row['name']]}"]["covariance"], asked.damping)
            G = damped(covariances[0][f"gradients/{row['name']}"]["covariance"], asked.gradients_damped_by)
            alive = cut["alive"]
            if inside:
                weight, H = cut["down"], H[alive][:, alive]
            else:
                weight, G = weight[alive], G[alive][:, alive]
            for bits in (2, 4):
                expected = 2 * expected_loss(weight, Grid(bits, 16), H, G)
                assert row["rounding"][str(bits)] == pytest.approx(expected, rel=1e-6)
    for block in summary["blocks"]:
        for matrix in (m for cut in block["cuts"] for m in cut["matrices"]):
            del matrix["rounding"]
    assert all(row.pop("rounding")["2"] > 0 for row in summary["units"])
    del summary["rest"]
    assert summary == plain


def test_sensitivity_measures_every_matrix_at_every_ratio(params, covariances):
    asked = params.spectrum["input"].model_copy(update={"sensitivity_windows": 2, "sensitivity_ratios": (0.3, 0.6)})
    _, summary = factored(params.model_copy(update={"spectrum": {"input": asked}}), "input", covariances)
    assert set(summary["sensitivity"]) == {row["name"] for row in summary["units"]}
    assert all(set(scores) == {0.3, 0.6} for scores in summary["sensitivity"].values())
    assert np.isfinite([s for scores in summary["sensitivity"].values() for s in scores.values()]).all()
    assert summary["computed_in"] == {"covariance": "float32", "sensitivity": "float32"}


def test_clipped_gradients_stand_beside_the_others_and_shrinkage_is_damping_up_to_a_factor(params, covariances):
    asked = params.covariance.model_copy(update={"gradient_clip": (0.5, 2.0), "gradient_margin": 0.125})
    store = Store()
    collect(tiny.llama(), windows(), asked, Group(), store, {})
    for name, tensors in covariances[0].items():
        assert all(torch.equal(tensor, store[name][key]) for key, tensor in tensors.items()), name
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    model = tiny.llama()
    with watching_output_gradients({name: model.get_submodule(name)}, lambda _, rows: seen.append(rows)):
        list(run_batches(model, split_windows(windows(), 8), "empirical"))
    rows = clipped(seen[0].unflatten(0, (8, 32)), 0.5, 2.0, 0.125).double()
    G = store[f"gradients/{name}"]["clipped"].double()
    torch.testing.assert_close(G, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-9)
    assert len(rows) == 8 * 24

    spectrum = params.spectrum["input"].model_copy(
        update={"metric": "kfac_clipped", "damping": 0.1 / 0.9, "gradient_damping": 0.3 / 0.7}
    )
    factors = Store()
    described = collect(tiny.llama(), windows(), asked, Group(), store, {})
    factorise(tiny.llama(), spectrum, asked, store, described, windows(), Group(), factors)
    H = store[f"inputs/{described['owners'][name]}"]["covariance"].double()
    H, G = (((1 - a) * M + a * M.diagonal().mean() * torch.eye(len(M))) for M, a in ((H, 0.1), (G, 0.3)))
    expected = whitened_spectrum(tiny.llama().get_submodule(name).weight.detach(), H, G)
    torch.testing.assert_close(factors["singular_values"][name] ** 2 * 0.9 * 0.7, expected.singular_values**2)
    torch.testing.assert_close(
        factors[f"factors/{name}"]["duals"].T @ factors[f"factors/{name}"]["vectors"],
        expected.duals.T @ expected.vectors,
    )


def test_a_linear_that_sees_some_tokens_only_is_no_place_for_clipped_gradients(params):
    model = tiny.llama()
    mlp = model.model.layers[1].mlp
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(x[:, 1:]), x[:, :1]], 1)
    asked = params.covariance.model_copy(update={"gradient_clip": (0.1, 10.0)})
    with pytest.raises(
        UnevenTokensError,
        match=r"layers.1.mlp.down_proj sees 124 tokens of windows of 32: covariance.gradient_clip needs",
    ):
        collect(model, windows(), asked, Group(), Store(), {})
