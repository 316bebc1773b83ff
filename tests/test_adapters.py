"""LoRA by plain peft on compressed models: on every layer, saved, loaded, merged into a folder of the same size."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from drank.model.adapters import LoraLowRankLinear
from drank.model.layers import LowRankLinear
from tests import compressed, tiny
from tests.compressed import spec

IDS = torch.arange(2, 50).view(2, 24)
O_PROJ = "model.layers.{}.self_attn.o_proj"
GROUP = {
    O_PROJ.format(0): spec("pivot", 32, 32, 9, basis=O_PROJ.format(0), first=0, kept=3),
    O_PROJ.format(1): spec("pivot", 32, 32, 9, basis=O_PROJ.format(0), first=3, kept=6),
}
MODELS = compressed.MODELS | {"llama": (tiny.llama, compressed.LLAMA | GROUP)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return compressed.write_all(MODELS, tmp_path_factory)


@pytest.fixture
def llama(folders):
    return load(folders["llama"])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(model, targets, **options):
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options))


def n_adapted(model):
    return sum(isinstance(module, LoraLowRankLinear) for module in model.modules())


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(("name", "n_layers"), [("llama", 14), ("gpt2", 8)])
def test_all_linear_is_every_layer_trained_saved_loaded_and_merged_at_the_same_size(folders, name, n_layers, tmp_path):
    folder = folders[name]
    base = load(folder)
    before, shapes = logits(base), {name: tensor.shape for name, tensor in base.state_dict().items()}
    low_rank = [name for name, module in base.named_modules() if isinstance(module, LowRankLinear)]
    model = adapted(base, "all-linear")
    layers = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    assert [name for name in low_rank if not isinstance(layers[name], LoraLowRankLinear)] == []
    assert sum(hasattr(module, "lora_A") for module in layers.values()) == n_layers
    assert torch.equal(logits(model), before)
    trained = logits(train(model))
    assert all(module.lora_B["default"].weight.any() for module in layers.values() if hasattr(module, "lora_B"))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    by_itself = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert torch.equal(logits(by_itself), trained), "transformers finds the base model and the adapter"
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), before)
    merged = again.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "merged")]
    assert sizes[0] == sizes[1]
    assert (folder / "config.json").read_bytes() == (tmp_path / "merged/config.json").read_bytes()


def test_a_tied_head_is_adapted_beside_a_layer_saved_and_merged(llama, folders, tmp_path):
    model = adapted(llama, ["q_proj", "lm_head"])
    trained = logits(train(model))
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(folders["llama"]), tmp_path / "adapter")), trained)
    model.base_model.model.config.tie_word_embeddings = False  # the merged head is no longer the embeddings
    head = model.base_model.model.lm_head.base_layer
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "up_proj", "o_proj"], 6),
        (r".*layers\.0\.mlp\.(gate|up)_proj", 2),
        (["layers.1.self_attn.q_proj", "down_proj"], 2),
    ],
)
def test_transformers_own_adapters_find_layers_by_names_and_expressions(targets, count, llama):
    llama.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False))
    assert n_adapted(llama) == count
    assert logits(llama).isfinite().all()


def test_a_half_precision_model_with_two_adapters_and_dropout_is_merged_and_unmerged(llama):
    model = adapted(llama.bfloat16(), "all-linear", lora_dropout=0.1)
    model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    trained = logits(model)
    assert trained.dtype == torch.bfloat16
    model.merge_adapter()
    assert (logits(model) - trained).abs().max() < 0.1 * trained.abs().max()
    model.unmerge_adapter()
    assert (logits(model) - trained).abs().max() < 0.1 * trained.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoraLinearVariant needs a dense weight: compressed layers take plain LoRA only"),
        ({"lora_bias": True}, "lora_bias is True: compressed layers take adapters without a bias"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(options, message, llama):
    with pytest.raises(ValueError, match=message):
        adapted(llama, ["q_proj"], **options)
