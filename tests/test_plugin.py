"""The format: plain save_pretrained and from_pretrained on random models of six architectures, and all it
refuses."""

import copy
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from drank.model.format import FORMAT_VERSION, FormatError
from drank.model.layers import FactorLinear
from drank.model.quantizer import DrankConfig, attach
from drank.project.documents import AllocationDocument, Config, read_document
from drank.project.files import FileError
from tests import tiny
from tests.compressed import randomise

LLAMA_NAMES = (
    "model.layers.{}.", "self_attn.q_proj", "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
)  # fmt: skip

# Model type, changes to its config, the name of a layer and in it: a module whose basis layers share, one whose basis
# they share in pivot form, and the inputs (the first in pivot form) and the output of an MLP that has lost channels.
ARCHITECTURES = {
    "llama": ("llama", {"num_key_value_heads": 4}, *LLAMA_NAMES),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, *LLAMA_NAMES),
    "qwen2": ("qwen2", {}, *LLAMA_NAMES),
    "gpt2": ("gpt2", {}, "transformer.h.{}.", "attn.c_attn", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": ("opt", {}, "model.decoder.layers.{}.", "self_attn.q_proj", "self_attn.out_proj", ("fc1",), "fc2"),
    "gpt_neox": (
        "gpt_neox", {}, "gpt_neox.layers.{}.", "attention.query_key_value", "attention.dense",
        ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h",
    ),
    "phi3": (
        "phi3", {}, "model.layers.{}.", "self_attn.qkv_proj", "self_attn.o_proj", ("mlp.gate_up_proj",),
        "mlp.down_proj",
    ),
}  # fmt: skip
CHANNELS = 22
Q = "model.layers.{}.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def dense_model(architecture, dtype=torch.float32):
    model_type, changes, *_ = ARCHITECTURES[architecture]
    return tiny.decoder(model_type, **changes, dtype=dtype)


def spec(model, name, form, rank=None, **more):
    module = model.get_submodule(name)
    n_out, n_in = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    return {"form": form, "out_features": n_out, "in_features": n_in} | ({"rank": rank} if rank else {}) | more


def all_forms(model, architecture):
    """Specs with every form: a shared basis, one of rows kept of two modules, an unshared one and a pivot form with
    fewer rows, a dense with fewer columns."""
    _, _, layer, shared, pivot, ups, down = ARCHITECTURES[architecture]
    first, second = layer.format(0), layer.format(1)
    channels = 2 * CHANNELS if ups == ("mlp.gate_up_proj",) else CHANNELS
    asked = [
        (first + shared, "factors", 3, {}),
        (second + shared, "factors", 3, {"basis": first + shared}),
        (first + pivot, "pivot", 5, {"basis": first + pivot, "first": 0, "kept": 2}),
        (second + pivot, "pivot", 5, {"basis": first + pivot, "first": 2, "kept": 3}),
        *(
            (first + up, form, 4, {"out_features": channels})
            for up, form in zip(ups, ("pivot", "factors"), strict=False)
        ),
        (first + down, "dense", None, {"in_features": CHANNELS}),
    ]
    return {name: spec(model, name, form, rank, **more) for name, form, rank, more in asked}


def compressed(architecture, specs=None, dtype=torch.float32):
    model = dense_model(architecture, dtype)
    specs = specs or all_forms(model, architecture)
    attach(model, specs, {"variant": "d-rank-80", "ratios": [0.8]})
    for name in specs:
        randomise(model.get_submodule(name))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 26).view(2, 12)).logits


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """(architecture, in-memory compressed model, its folder, the model loaded from there)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = compressed(request.param)
    model.save_pretrained(folder)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return request.param, model, folder, reloaded


@pytest.fixture
def llama(tmp_path):
    """The folder of a compressed llama, to be spoilt."""
    compressed("llama").save_pretrained(tmp_path)
    return tmp_path


def test_a_reloaded_model_is_the_one_saved_to_the_last_bit_and_saves_the_same_bytes(saved, tmp_path):
    _, model, folder, reloaded = saved
    assert torch.equal(logits(reloaded), logits(model))
    reloaded.tie_weights()
    assert torch.equal(logits(reloaded), logits(model))
    reloaded.save_pretrained(tmp_path)
    assert files(tmp_path) == files(folder)


def test_shared_basis_is_one_tensor_on_disk_and_one_parameter_in_memory(saved):
    architecture, model, folder, reloaded = saved
    _, _, layer, shared, pivot, *_ = ARCHITECTURES[architecture]
    stored = load_file(folder / "model.safetensors")
    for name in (f"{shared}.basis", f"{pivot}.basis.weight"):
        owner, other = layer.format(0) + name, layer.format(1) + name
        assert {owner, other} & stored.keys() == {owner}
        for candidate in (model, reloaded, copy.deepcopy(model)):
            assert candidate.get_parameter(other) is candidate.get_parameter(owner)


def test_dequantised_model_is_a_plain_one_with_the_same_logits(saved, tmp_path):
    architecture, model, folder, _ = saved
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.dequantize()
    plain.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {type(m) for m in reloaded.modules()} == {type(m) for m in dense_model(architecture).modules()}
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_bfloat16_and_shards_survive_the_round_trip(architecture, tmp_path):
    model = compressed(architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in reloaded.named_buffers() if name.endswith("places")} == {torch.int32}
    assert torch.equal(logits(reloaded), logits(model))


def test_the_bare_decoder_loads_from_the_same_folder(llama):
    bare, model = AutoModel.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.arange(8)[None]
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_bias_is_carried_over_where_the_output_size_is_unchanged_and_what_is_unchanged_is_left_alone():
    model = dense_model("qwen2")
    bias, down = nn.init.normal_(model.get_submodule(Q.format(0)).bias), model.get_submodule(DOWN)
    attach(model, {Q.format(0): spec(model, Q.format(0), "factors", 3), DOWN: spec(model, DOWN, "dense")}, {})
    assert isinstance(model.get_submodule(Q.format(0)), FactorLinear)
    assert model.get_submodule(Q.format(0)).bias is bias
    assert model.get_submodule(DOWN) is down


def test_keys_of_later_versions_survive_a_round_trip(llama, tmp_path_factory):
    written, again = [], tmp_path_factory.mktemp("again")

    def add(config):
        config["license"] = {"name": "x"}
        config["modules"][DOWN]["note"] = [1, 2]
        written.append(config)

    edit_config(llama, add)
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(again)
    assert [json.loads((again / "config.json").read_text(encoding="utf-8"))["quantization_config"]] == written


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(3, "upgrade with 'pip install"), (1, "build the folder again"), (None, "upgrade")],
)
def test_a_format_version_that_is_not_known_is_refused_with_what_to_do(llama, version, remedy):
    edit_config(llama, lambda config: config.update(format_version=version))
    with pytest.raises(FormatError, match=rf"format_version is {version!r}.* reads 2: {remedy}"):
        AutoModelForCausalLM.from_pretrained(llama)


FINE = {"form": "factors", "rank": 3, "out_features": 32, "in_features": 32}


@pytest.mark.parametrize(
    ("name", "kind", "key", "version"),
    [
        ("allocation.json", AllocationDocument, "format_version", 1),
        ("config.json", Config, "quantization_config.format_version", FORMAT_VERSION),
    ],
)
@pytest.mark.parametrize("step", [-1, 1])
def test_an_audit_refuses_documents_of_another_format(tmp_path, name, kind, key, version, step):
    document = {"format_version": version + step, "quant_method": "drank"}
    (tmp_path / name).write_text(json.dumps({"quantization_config": document} if kind is Config else document))
    with pytest.raises(FileError, match=f"{name}: {key}: Input should be {version}; another version of drank wrote it"):
        read_document(tmp_path / name, kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": "x" * 5000}, r"quantization_config\.modules is 'x+\.\.\.x+': Input should be a valid dict"),
        ({"modules": {"": FINE}}, r"quantization_config\.modules\..*key.* is '': String should have at least 1 char"),
        ({"provenance": "someone"}, r"quantization_config\.provenance is 'someone': Input should be a valid dict"),
        ({"to_dict": 1}, r"quantization_config\.to_dict is 1; transformers has a meaning of its own for this name"),
        ({"format_version": math.nan}, r"quantization_config\.format_version is nan; drank .* reads 2: upgrade"),
    ],
)
def test_a_malformed_section_is_refused_by_key_value_and_rule(change, message):
    with pytest.raises(FormatError, match=message) as refused:
        DrankConfig(**{"modules": {}, "provenance": {}, **change})
    assert len(str(refused.value)) < 300


def test_a_module_under_two_names_is_refused():
    with pytest.raises(FormatError, match=rf"layers\.0.*: another key of .*modules is also {re.escape(Q.format(0))}"):
        attach(dense_model("llama"), {Q.format(0): FINE, Q.format(0).removeprefix("model."): FINE}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda modules: modules["model.layers.0.mlp.up_proj"].update(rank=3),
            r"up_proj\.basis is stored with shape \(.*\), but the spec of .*up_proj makes it \(.*\): config.json is n",
        ),
        (
            lambda modules: modules["model.layers.0.mlp.gate_proj"].update(in_order=True),
            r"mlp\.gate_proj\.places is stored with shape \(22,\), but .*gate_proj makes it absent: config.json is not",
        ),
        (lambda modules: modules.pop("model.layers.0.mlp.up_proj"), "ignore_mismatched_sizes"),  # transformers' own
        (lambda modules: modules.clear(), "ignore_mismatched_sizes"),
    ],
)
def test_specs_that_are_not_those_of_the_weights_are_refused(llama, change, message):
    edit_config(llama, lambda config: change(config["modules"]))
    with pytest.raises((FormatError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.parametrize("key", ["basis", "weight", "places", "coefficients", "basis.weight"])
def test_a_folder_that_lacks_a_tensor_is_refused(llama, key):
    path = llama / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(f"_proj.{key}"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    told = rf"{lost.removeprefix('model.')} is in no weight file: the folder is incomplete"
    with pytest.raises(FormatError, match=told):
        AutoModelForCausalLM.from_pretrained(llama)


def group(owner, other):
    """Specs of two modules in pivot form that share a basis, one row and two of its three, but for these changes."""
    fine = {**FINE, "form": "pivot", "basis": Q.format(0)}
    return {
        Q.format(0): {**fine, "first": 0, "kept": 1, **owner},
        Q.format(1): {**fine, "first": 1, "kept": 2, **other},
    }


def one(**changes):
    return {Q.format(0): {**FINE, **changes}}


def two(**changes):
    """Factors that share the basis of layer 0, but for these changes to it."""
    return {**one(**changes), Q.format(1): {**FINE, "basis": Q.format(0)}}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({Q.format(0): 3}, r"modules\.model\.layers\.0\.self_attn\.q_proj is 3: Input should be a valid dict"),
        (one(form="sparse"), "q_proj: form is 'sparse'; known are dense, embedding, factors, pivot"),
        (one(rank=10**40), "q_proj: rank is 1000.*; it must be an integer of at most 31"),
        (one(out_features=math.inf), r"q_proj\.out_features is inf: Input should be a valid integer"),
        (one(rank=0), r"q_proj\.rank is 0: Input should be greater than or equal to 1"),
        (one(rank=None), "q_proj: rank is None; it must be an integer of at most 31"),
        (one(rank=32), "q_proj: rank is 32; .* at most 31 for 32 x 32 in form 'factors', or form 'dense'"),
        (one(rank=32, form="pivot"), "rank is 32; .* at most 31 for 32 x 32 in form 'pivot'"),
        (one(out_features=33), r"q_proj: 33 x 32 \(out x in\) is larger .* 32 x 32"),
        ({"model.layers.7.self_attn.q_proj": FINE}, "layers.7.self_attn.q_proj is not in this LlamaForCausalLM"),
        ({"model.layers.0.self_attn": FINE}, "self_attn is LlamaAttention; only nn.Linear and Conv1D"),
        ({"model.embed_tokens": FINE}, "embed_tokens is Embedding"),
        ({"lm_head": {**FINE, "out_features": 320}}, r"lm_head: its weight is also that of another module \(tied\)"),
        ({Q.format(1): {**FINE, "basis": Q.format(0)}}, "basis is .*0.*; the owner of a basis must be among"),
        (two(form="pivot"), "layers.1.*: basis is .*layers.0.*; that module has no basis of its own"),
        (two(rank=4), "layers.1.*: basis is .*layers.0.*; rank and in_features there are 4 and 32; they must be the s"),
        (one(form="dense", basis=Q.format(0)), "layers.0.*: basis is '.*'; form 'dense' shares none"),
        (group({"form": "factors"}, {}), "layers.1.*; that module has no basis of its own to share in form 'pivot'"),
        (group({"basis": None}, {}), "layers.1.*; that module has no basis of its own to share in form 'pivot'"),
        (group({}, {"form": "factors"}), "layers.1.*; that module has no basis of its own to share in form 'factors'"),
        (group({}, {"in_features": 15}), "layers.1.*; rank and in_features there are 3 and 32"),
        (group({"in_order": True}, {}), "layers.0.*: in_order is True; only 'pivot' without a shared basis"),
        (one(in_order=True), "layers.0.*: in_order is True; only 'pivot' without a shared basis"),
        (group({"first": None}, {}), "layers.0.*: first is None; form 'pivot' needs it here"),
        (group({}, {"kept": 33}), "layers.1.*: kept is 33; it must be at most the module's out_features, 32"),
        (group({}, {"first": 2}), "layers.1.*: first is 2, but the kept rows before it .* end at 1"),
        (group({}, {"kept": 1}), "layers.0.*: the modules that share its basis keep 2 rows of 3; .* is one of them mi"),
    ],
)
def test_specs_that_are_malformed_or_do_not_fit_are_refused_and_change_nothing(specs, message):
    model = dense_model("llama-tied")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(FormatError, match=message):
        attach(model, {DOWN: spec(model, DOWN, "factors", 4), **specs}, {})
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model.config, "quantization_config")


def test_attaching_twice_is_refused():
    model = attach(dense_model("llama"), one(), {})
    with pytest.raises(FormatError, match=r"q_proj is FactorLinear; only nn\.Linear"):
        attach(model, one(), {})


@pytest.mark.parametrize(("first", "second"), [((0, 0), (0, 3)), ((0, 3), (3, 0)), ((1, 2), (0, 1))])
def test_the_modules_of_a_group_keep_any_share_of_its_rows(first, second, tmp_path):
    model = compressed("llama", group(*({"first": a, "kept": n} for a, n in (first, second))))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_modules_all_of_whose_rows_are_kept_survive_the_round_trip(tmp_path):
    model = dense_model("llama")
    owner, *others = [f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in ("k", "v")]
    # Three smaller modules, whole in the basis: their coefficients are empty tensors.
    specs = {owner: spec(model, owner, "pivot", 15, basis=owner, first=0, kept=5)}
    for name, first, n in zip(others, (5, 9, 12), (4, 3, 3), strict=True):
        specs[name] = spec(model, name, "pivot", 15, out_features=n, basis=owner, first=first, kept=n)
    compressed("llama", specs).save_pretrained(tmp_path / "first")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    reloaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "first")
    assert all(reloaded.get_submodule(name).dense_weight().isfinite().all() for name in specs)


def test_loading_a_dense_folder_does_not_compress_it(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=DrankConfig())


LOAD = "AutoModelForCausalLM.from_pretrained(folder)"


def python(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_drank_loading_fails_and_importing_it_then_is_enough_for_peft_too(tmp_path):
    for architecture in ("llama", "gpt2"):
        forms = all_forms(dense_model(architecture), architecture)
        for form, shared in (("factors", False), ("pivot", False), ("dense", False), ("pivot", True)):
            chosen = {name: s for name, s in forms.items() if (s["form"], "basis" in s) == (form, shared)}
            compressed(architecture, chosen).save_pretrained(tmp_path / f"{architecture}-{shared}-{form}")
    code = (
        "import sys\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        f"    try: {LOAD}\n"
        "    except RuntimeError as error: assert 'ignore_mismatched_sizes' in str(error), error\n"
        "    else: raise SystemExit(f'{folder} was loaded without drank')\n"
        "import drank\n"
        f"for folder in sys.argv[1:]: model = {LOAD}\n"
        "adapted = get_peft_model(model, LoraConfig(target_modules=['o_proj']))\n"
        "assert any(type(m).__name__ == 'LoraLowRankLinear' for m in adapted.modules())\n"
    )
    python(code, *sorted(tmp_path.iterdir()))  # the last one is llama-True-pivot


def test_importing_drank_first_is_light_and_enough(llama):
    code = (
        "import sys, drank\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'import drank is heavy'\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        f"{LOAD}\n"
    )
    python(code, llama)
