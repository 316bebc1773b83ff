"""Compressed layers as plain linears: the same outputs, a shared basis once, back again, and quantisers that find them.

The quantisers are the real ones, in environments that have them; docs/loading.md says how they were tried.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import drank
from drank.model.layers import LowRankLinear
from drank.model.quantizer import attach
from drank.model.shown import ShownError
from tests import compressed, tiny
from tests.compressed import spec

IDS = torch.arange(2, 50).view(2, 24)
O_PROJ, V_PROJ = "model.layers.{}.self_attn.o_proj", "model.layers.{}.self_attn.v_proj"
SHARED = {  # a group whose first module keeps every row, and has no coefficients
    O_PROJ.format(0): spec("pivot", 32, 32, 9, basis=O_PROJ.format(0), first=0, kept=3),
    O_PROJ.format(1): spec("pivot", 32, 32, 9, basis=O_PROJ.format(0), first=3, kept=6),
    V_PROJ.format(0): spec("pivot", 16, 32, 16, basis=V_PROJ.format(0), first=0, kept=16),
    V_PROJ.format(1): spec("pivot", 16, 32, 16, basis=V_PROJ.format(0), first=16, kept=0),
}
MODELS = compressed.MODELS | {"llama": (tiny.llama, compressed.LLAMA | SHARED)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return compressed.write_all(MODELS, tmp_path_factory)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def inner_products(model):
    return {name: module for name, module in model.named_modules() if name.endswith((".inner", ".outer"))}


@pytest.mark.parametrize(("name", "n_linears"), [("llama", 16), ("gpt2", 8)])
def test_outputs_are_the_same_and_every_parameter_is_there_once(folders, name, n_linears):
    model = load(folders[name])
    before, said = logits(model), model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    parameters = {id(p) for p in model.parameters() if p.numel()}  # a module without coefficients has an empty one
    assert drank.as_linears(model) is model
    assert torch.equal(logits(model), before)
    assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False), said)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    assert {id(p) for p in model.parameters()} == parameters
    assert len(inner_products(model)) == n_linears
    assert {type(linear) for linear in inner_products(model).values()} == {nn.Linear}


@pytest.mark.parametrize("name", MODELS)
def test_turned_back_a_model_saves_the_folder_that_it_came_from(folders, name, tmp_path):
    model = drank.as_linears(AutoModelForCausalLM.from_pretrained(folders[name]))
    with pytest.raises(ShownError, match=r"save drank\.as_compressed\(model\)"):
        model.save_pretrained(tmp_path)
    drank.as_compressed(model).save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folders[name] / file).read_bytes()
    with pytest.raises(ShownError, match="shows no compressed layer"):
        drank.as_compressed(model)


def test_a_shown_model_becomes_the_plain_one_that_the_compressed_model_becomes(folders):
    plain = drank.as_linears(load(folders["llama"])).dequantize()
    assert torch.equal(logits(plain), logits(load(folders["llama"]).dequantize()))


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ShownError, match="LlamaForCausalLM has no compressed layer to show"):
        drank.as_linears(tiny.llama())
    name = "model.layers.0.self_attn.q_proj"
    rounded = attach(tiny.llama(), {name: spec("factors", 32, 32, 9, bits=8, group=32)}, {})
    with pytest.raises(ShownError, match=rf"{name} and 0 others are rounded .* model\.dequantize"):
        drank.as_linears(rounded)
    assert isinstance(rounded.get_submodule(name), LowRankLinear)


def test_an_adapter_on_every_inner_product_is_merged_into_a_folder_of_the_same_size(folders, tmp_path):
    shown = drank.as_linears(load(folders["llama"]))
    model = get_peft_model(shown, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    with pytest.raises(ShownError, match="wrapped"):
        drank.as_compressed(shown)
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = logits(model.eval())
    merged = model.merge_and_unload()
    assert inner_products(merged).keys() <= adapted
    drank.as_compressed(merged).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), trained, rtol=1e-4, atol=1e-4)
    assert (trained - logits(load(folders["llama"]))).abs().max() > 0.01


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: an optional quantiser")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return {type(linear.weight) for linear in inner_products(model).values()} != {nn.Parameter}


def bitsandbytes(model, four=False):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: an optional quantiser")
    for name, linear in inner_products(model).items():
        sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
        sizes["bias"] = linear.bias is not None
        kind, more = bnb.nn.Linear8bitLt, {"has_fp16_weights": False}
        if four:
            kind, more = bnb.nn.Linear4bit, {"compute_dtype": torch.float32, "quant_type": "nf4"}
        new = kind(**sizes, **more)
        new.load_state_dict(linear.state_dict())
        model.set_submodule(name, new.to("cpu"))  # rounds
    kinds = {linear.weight.dtype for linear in inner_products(model).values()}
    return kinds == {torch.uint8 if four else torch.int8}


def nf4(model):
    return bitsandbytes(model, four=True)


def quanto(model):
    package = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed: an optional quantiser")
    package.quantize(model, weights=package.qint8)
    package.freeze(model)
    return all(isinstance(linear, package.QLinear) for linear in inner_products(model).values())


def compressed_tensors(model):
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: optional")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    quantization = package.quantization
    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    groups = {"all": quantization.QuantizationScheme(targets=["Linear"], weights=weights)}
    config = {"quantization_status": "initialized", "format": "pack-quantized", "ignore": ["lm_head"]}
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups=groups, **config))
    for linear in (module for module in model.modules() if hasattr(module, "weight_scale")):
        low, high = (bound(linear.weight, 1, keepdim=True) for bound in (torch.amin, torch.amax))
        linear.weight_scale.data.copy_(calculate_qparams(low, high, weights)[0])
    rounded, compressor = logits(model), ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    packed = all(hasattr(linear, "weight_packed") for linear in inner_products(model).values())
    compressor.decompress_model(model)
    return packed and torch.equal(logits(model), rounded)


@pytest.mark.parametrize(
    ("quantise", "error"),
    [(torchao, 0.1), (bitsandbytes, 0.1), (nf4, 0.8), (quanto, 0.1), (compressed_tensors, 0.1)],
)
def test_a_quantiser_of_others_rounds_every_inner_product_and_a_shared_basis_once(folders, quantise, error):
    model = load(folders["llama"])
    before = logits(model)
    names = inner_products(drank.as_linears(model)).keys()
    assert quantise(model)
    assert inner_products(model).keys() == names
    assert 0 < (logits(model) - before).norm() / before.norm() < error
    if quantise is not compressed_tensors:  # which has put its rounded weights back
        with pytest.raises(ShownError, match="were quantised"):
            drank.as_compressed(model)
