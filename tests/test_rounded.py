"""Few bits: packing by hand, prices, layers, what rounding does to a model's modules, folders, and every mistake."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from drank.method.allocation.units import PRICES
from drank.method.channels import remove_channels
from drank.method.precisions import FULL, PRECISIONS, STORED, Grid, bytes_of, embedding_bytes
from drank.method.rounding import feedback, loss, nearest
from drank.method.spectrum import Metric, whitened_spectrum
from drank.model.format import FormatError, parse
from drank.model.forms import check_specs, numbers_in_integers, stored_shapes
from drank.model.groups import find_groups, find_mlps
from drank.model.layers import FORMS, RoundedEmbedding, RoundedHead, RoundedLinear
from drank.model.linears import find_linears
from drank.model.packing import pack, unpack
from drank.model.quantizer import attach
from drank.model.rounded import Rounding
from drank.steps.compression import compress
from drank.steps.evaluation import count_parameters
from tests import tiny
from tests.test_compression import IDS, Spectra, row, singles, units

BITS = [bits for bits in PRECISIONS if isinstance(bits, int) and bits < FULL]
GROUP = 16


def test_packing_by_hand():
    """4 bits: byte j has numbers j and 2 + j. 3 bits: a byte of the lower two bits of each, then one of the highest."""
    assert pack(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4).tolist() == [[0x31, 0x42]]
    assert pack(torch.tensor([[5, 2, 7]], dtype=torch.uint8), 3).tolist() == [[0b111001, 0b101]]
    assert pack(torch.tensor([[200, 7]], dtype=torch.uint8), 8).tolist() == [[200, 7]]


@given(st.integers(2, 8), st.integers(0, 3), st.integers(1, 70), st.integers(0, 99))
def test_unpacking_is_the_inverse_of_packing(bits, n_rows, n, seed):
    numbers = torch.randint(2**bits, (n_rows, n), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack(pack(numbers, bits), bits, n), numbers)


def stored_bytes(specs):
    sizes = {"U8": 1, "I8": 1, "scales": 2, "places": 4}
    kind = lambda name: name.rpartition(".")[2].rpartition("_")[2]  # noqa: E731
    return sum(math.prod(shape) * sizes.get(kind(name), 1) for name, shape in stored_shapes(specs).items())


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_price_in_bytes_is_that_of_the_stored_tensors(form, bits):
    own = {} if form == "dense" else {"rank": 7} | ({"in_order": False} if form == "pivot" else {})
    spec = {"form": form, "out_features": 30, "in_features": 45, "bits": bits, "group": GROUP, **own}
    specs = parse({"format_version": 2, "modules": {"a": spec}, "provenance": {}}).modules
    assert stored_bytes(specs) == bytes_of(form, 30, 45, 7, bits, GROUP)
    if form != "dense":
        assert bytes_of(form, 30, 45, 7, FULL, GROUP) == 2 * PRICES[form](30, 45, 7) + (120 if form == "pivot" else 0)
        assert numbers_in_integers(specs) == PRICES[form](30, 45, 7)


def test_every_storage_has_a_price_in_bytes():
    assert set(STORED) == {"dense", *PRICES} == {"dense", *FORMS}
    assert embedding_bytes(10, 6, 8) == 10 * (6 + 2)
    assert embedding_bytes(10, 6, FULL) == 10 * 6 * 2


def covariance(size, generator):
    x = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.fixture
def measured(generator):
    """Covariances of every linear of a tiny model, the same whenever they are asked for, as a Rounding wants them."""
    known = {}

    def of(name, size):
        return known.setdefault((name, size), covariance(size, generator))

    def rounding(model, gradients=True):
        sizes = {linear.name: linear for linear in find_linears(model, ["re:.*"])}
        return Rounding(
            GROUP,
            lambda name: of(f"inputs/{name}", sizes[name].in_features),
            (lambda name: of(f"gradients/{name}", sizes[name].out_features)) if gradients else None,
        )

    return rounding


def with_bits(rows, bits):
    return [{**unit, "bits": bits} for unit in rows]


def spectra_of(model, rounding):
    """The spectra in the very metrics that rounding uses."""
    found = Spectra()
    for linear in find_linears(model, ["re:.*"]):
        G = Metric(rounding.gradients(linear.name)) if rounding.gradients else None
        found[f"factors/{linear.name}"] = whitened_spectrum(
            linear.weight.detach().float(), Metric(rounding.inputs(linear.name)), G
        )
    return found


@torch.no_grad()
def weights_of(model):
    """Every linear as it multiplies, in the order of features that it has."""
    return {
        name: module.dense_weight().float() if hasattr(module, "dense_weight") else module.weight.detach().float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }


@pytest.mark.parametrize("form", ["factors", "pivot"])
@pytest.mark.parametrize("gradients", [False, True])
def test_in_8_bits_a_form_is_what_it_was(form, gradients, measured):
    """Rows and channels that were reordered have found their covariances, else C would be fitted to something else."""
    plain, model = tiny.llama(), tiny.llama()
    rounding = measured(model, gradients)
    spectra = spectra_of(model, rounding)
    compress(plain, units(plain, form, 9), spectra, {})
    compress(model, with_bits(units(model, form, 9), 8), spectra, {}, rounding)
    for name, expected in weights_of(plain).items():
        H = rounding.inputs(name)
        if "down_proj" in name and form == "pivot":
            continue  # its columns follow the channels of the MLP
        found = weights_of(model)[name]
        assert loss(found - expected, H) < 0.02 * loss(expected, H), name


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("form", ["dense", "factors", "pivot"])
def test_feedback_loses_less_than_rounding_to_nearest(form, bits, measured):
    model = tiny.llama()
    rounding, total = measured(model, gradients=False), {}
    spectra, before = spectra_of(model, rounding), weights_of(model)
    for kind in (rounding, Rounding(GROUP)):
        rounded = tiny.llama()
        rows = units(rounded, form, 12)
        rows = [unit for unit in rows if "mlp" not in unit["name"]]  # channels keep their numbers
        compress(rounded, with_bits(rows, bits), spectra, {}, kind)
        total[kind] = [
            loss(weights_of(rounded)[u["name"]] - before[u["name"]], rounding.inputs(u["name"])) for u in rows
        ]
    assert sum(total[rounding]) < (0.7 if form == "dense" else 0.98) * sum(total[Rounding(GROUP)])


def test_rows_of_zeros_and_members_that_keep_all_their_rows_round_too(measured):
    model = tiny.llama()
    groups = find_groups(find_linears(model, ["k_proj"]), 2, even_with_grouped_heads=True)
    ((first, second),) = groups
    with torch.no_grad():
        second.module.weight.zero_()
    stacked = torch.cat([first.weight, second.weight]).detach().float()
    spectra = Spectra({f"factors/{first.name}": whitened_spectrum(stacked)})
    compress(model, with_bits([row((first, second), "pivot", 16)], 4), spectra, {}, measured(model, gradients=False))
    assert not model.get_submodule(second.name).dense_weight().any()
    kept = model.get_submodule(first.name).dense_weight()
    assert (kept - stacked[:16]).norm() < 0.1 * stacked.norm()


@pytest.mark.parametrize("form", ["factors", "pivot"])
def test_a_group_in_few_bits_stores_its_basis_once(form, measured, tmp_path):
    model = tiny.llama()
    groups = find_groups(find_linears(model, ["q_proj", "gate_proj"]), 2, even_with_grouped_heads=True)
    stacked = {group[0].name: torch.cat([m.weight for m in group]).detach().float() for group in groups}
    spectra = Spectra({f"factors/{name}": whitened_spectrum(weight) for name, weight in stacked.items()})
    rows = with_bits([row(group, form, 9) for group in groups], 8)
    compress(model, rows, spectra, {}, measured(model, gradients=False))
    loaded = again(model, tmp_path)
    key = "basis.weight" if form == "pivot" else "basis"
    for name in ("self_attn.q_proj", "mlp.gate_proj"):
        first, second = (loaded.get_submodule(f"model.layers.{layer}.{name}") for layer in (0, 1))
        for suffix in ("", "_scales", "_zeros"):
            assert first.get_parameter(key + suffix) is second.get_parameter(key + suffix)
    specs = loaded.config.quantization_config.specs
    assert numbers_in_integers(specs) == sum(PRICES[form](len(w), 32, 9) for w in stacked.values())


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_removed_channels_are_rounded_in_the_covariance_of_those_that_stay(build, measured, tmp_path):
    model = build()
    linears = find_linears(model, ["re:.*"])
    mlp, rounding = find_mlps(model, linears)[1], measured(model, gradients=False)
    n_out, n = mlp.down.out_features, mlp.n_channels
    H = rounding.inputs(mlp.down.name)
    (cut,) = remove_channels(mlp.down.weight.detach().float(), H, torch.eye(n_out), [n - 20])
    sizes = {"out_features": n_out, "in_features": n - 20}
    rows = [row((mlp.down,), "dense", n_out) | sizes]
    stored = Spectra({f"cuts/{mlp.name}.{n - 20}": {"alive": cut.alive, "down": cut.down.float()}})
    for linear in mlp.before:
        rows.append(row((linear,), "dense", 1) | {"out_features": n - 20})
    compress(model, with_bits(rows, 4), stored, {}, rounding)
    expected = feedback(cut.down.float(), Grid(4, GROUP), H[cut.alive][:, cut.alive]).weight
    assert torch.equal(again(model, tmp_path).get_submodule(mlp.down.name).dense_weight(), expected)


def again(model, folder):
    """The model, saved and loaded, after a look that it is saved again to the same bytes."""
    model.save_pretrained(folder / "first")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "first", dtype="auto")
    loaded.save_pretrained(folder / "second")
    names = ("model.safetensors", "config.json")
    first, second = ([(folder / part / name).read_bytes() for name in names] for part in ("first", "second"))
    assert first == second
    if model.dtype == torch.float32:  # elsewhere the model in memory has rounded more than its weights
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    return loaded


def few_bits(bits, form="dense", build=tiny.llama, embedding_bits=8):
    model = build().bfloat16()
    weights = Spectra({f"factors/{x.name}": whitened_spectrum(x.weight.detach().float()) for (x,) in singles(model)})
    return compress(
        model, with_bits(units(model, form, 9), bits), weights, {"variant": "x"}, Rounding(GROUP), embedding_bits
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", ["dense", "factors", "pivot"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
def test_a_folder_loads_computes_is_saved_again_and_multiplied_out(bits, form, build, tmp_path):
    model = few_bits(bits, form, build)
    loaded = again(model, tmp_path)
    single = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert single.dtype == single(IDS).logits.dtype == torch.float32
    assert count_parameters(loaded) == count_parameters(single)
    if form == "dense":
        assert count_parameters(loaded) == count_parameters(build())
    logits = single(IDS).logits
    plain = single.dequantize()
    assert not any(isinstance(m, RoundedLinear | RoundedEmbedding | RoundedHead) for m in plain.modules())
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, logits)
    weights = load_file(tmp_path / "first/model.safetensors")
    integers = sum(t.numel() for t in weights.values() if t.dtype in (torch.uint8, torch.int8))
    assert integers < 1.2 * build().num_parameters()
    body = AutoModel.from_pretrained(tmp_path / "first")
    assert isinstance(body.get_input_embeddings(), RoundedEmbedding)


def test_embeddings_and_a_tied_head_have_the_same_integers():
    model = tiny.llama().float()
    before = model.get_input_embeddings().weight.detach().clone()
    compress(model, [], Spectra(), {}, embedding_bits=8)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, RoundedEmbedding)
    assert head.weight is embedding.weight
    assert head.weight_scales is embedding.weight_scales
    expected = nearest(before, Grid(8, 32, symmetric=True)).weight
    assert torch.equal(embedding.dense_weight(), expected)
    assert torch.equal(embedding(IDS), expected[IDS])
    for n in (1, 2, 7):  # few tokens take another way
        x = torch.randn(n, 1, 32)
        with torch.no_grad():
            torch.testing.assert_close(head(x), x @ expected.T)
        x.requires_grad_()
        head(x).sum().backward()
        torch.testing.assert_close(x.grad, expected.sum(0).expand(n, 1, 32))
    assert ((expected - before).abs().amax(1) <= before.abs().amax(1) / 127).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_its_own_has_integers_of_its_own(bias, tmp_path):
    model = untied_head(bias)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    compress(model, [], Spectra(), {}, embedding_bits=8)
    loaded = model if bias else again(model, tmp_path)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (type(head), type(embedding)) == (RoundedHead, RoundedEmbedding)
    assert head.weight is not embedding.weight
    x, expected = torch.randn(7, 32), nearest(before["lm_head.weight"], Grid(8, 32, symmetric=True)).weight
    assert torch.equal(head.dense_weight(), expected)
    for n in (1, 7):
        with torch.no_grad():
            torch.testing.assert_close(head(x[:n]), torch.nn.functional.linear(x[:n], expected, head.bias))
    specs = loaded.config.quantization_config.specs
    assert stored_bytes(specs) == 2 * embedding_bytes(320, 32, 8)
    assert numbers_in_integers(specs) == 2 * 320 * 32
    assert count_parameters(loaded) == sum(t.numel() for t in before.values())
    if bias:
        return  # this architecture has none, so no folder has it
    body = AutoModel.from_pretrained(tmp_path / "first")
    assert torch.equal(body.get_input_embeddings().weight, embedding.weight)
    logits, plain = loaded(IDS).logits, loaded.dequantize()
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    assert type(plain.get_output_embeddings()) is torch.nn.Linear
    plain.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, logits)


def untied_head(bias=False):
    model = tiny.llama(tie_word_embeddings=False)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(320))
    return model


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("embedding_bits", [8, FULL])
def test_a_loader_that_does_not_know_the_format_stops(build, bits, embedding_bits, tmp_path):
    few_bits(bits, "dense", build, embedding_bits).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_integers_are_not_trained():
    from peft import LoraConfig, get_peft_model

    model = few_bits(4)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(
        ValueError, match="rounded to few bits, to which no adapter could be merged: take the model that"
    ):
        get_peft_model(model, LoraConfig(target_modules="all-linear"))


Q = "model.layers.0.self_attn.q_proj"
DENSE = {"form": "dense", "out_features": 32, "in_features": 32, "bits": 4, "group": 16}
FACTORS = DENSE | {"form": "factors", "rank": 4}
EMBEDDING = {"form": "embedding", "out_features": 320, "in_features": 32, "bits": 8}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({Q: DENSE | {"bits": 9}}, "q_proj.bits is 9: Input should be less than or equal to 8"),
        ({Q: DENSE | {"bits": 1}}, "bits is 1"),
        ({Q: DENSE | {"bits": "4"}}, "bits is '4'"),
        ({Q: DENSE | {"group": 0}}, "group is 0"),
        ({Q: DENSE | {"group": None}}, "group is None; it goes with bits"),
        ({Q: DENSE | {"bits": None}}, "group is 16; it goes with bits"),
        ({Q: EMBEDDING}, "q_proj is Linear; form 'embedding' is for a model's plain input embedding or output head"),
        ({"lm_head": EMBEDDING}, "lm_head: model.embed_tokens has the same weight"),
        ({"model.embed_tokens": EMBEDDING | {"bits": 4}}, "embed_tokens: bits is 4; form 'embedding' has 8"),
        ({"model.embed_tokens": EMBEDDING | {"group": 32}}, "embed_tokens: group is 32"),
        ({"model.embed_tokens": EMBEDDING | {"out_features": 319}}, "319 x 32 .* the architecture has 320 x 32"),
        ({"model.embed_tokens": DENSE}, "only nn.Linear and Conv1D can be compressed"),
        (
            {Q: FACTORS, Q.replace("0", "1"): FACTORS | {"basis": Q, "bits": 8}},
            "bits and group there are 4 and 16; they must be the same",
        ),
    ],
)
def test_specs_that_cannot_be_are_named(modules, message):
    with pytest.raises(FormatError, match=message):
        attach(tiny.llama(), modules, {})


def test_a_module_of_few_bits_is_checked_without_a_model():
    check_specs(parse({"format_version": 2, "modules": {Q: DENSE}, "provenance": {}}).modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {f"{Q}.weight": w[f"{Q}.weight"].int()}, r"q_proj\.weight is stored as I32, but .* makes it U8"),
        (lambda w: w | {f"{Q}.weight": w[f"{Q}.weight"][:, :8]}, r"with shape \(32, 8, 1\), but .* \(32, 16, 1\)"),
        (lambda w: {k: t for k, t in w.items() if k != f"{Q}.weight_scales"}, "weight_scales is in no weight file"),
        (lambda w: {k: t for k, t in w.items() if "embed_tokens.weight_s" not in k}, "weight_scales is in no weight"),
    ],
)
def test_tensors_that_do_not_fit_their_spec_are_named(change, message, tmp_path):
    few_bits(4).save_pretrained(tmp_path)
    weights = change(load_file(tmp_path / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_form_without_a_basis_takes_rounding_to_nearest_alone(monkeypatch, measured):
    monkeypatch.setattr(FORMS["factors"], "spanning", None)
    model = tiny.llama()
    spectra, rows = spectra_of(model, measured(model)), with_bits(units(model, "factors", 9), 4)
    with pytest.raises(ValueError, match="'factors' knows no error feedback; set rounding to 'nearest'"):
        compress(tiny.llama(), rows, spectra, {}, measured(model))
    compress(tiny.llama(), rows, spectra, {}, Rounding(GROUP))
