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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from drank.method.pivot import pivot_rows, split_group
from drank.model.format import FORMAT_VERSION, FormatError
from drank.model.layers import FactorLinear, places
from drank.model.quantizer import DrankConfig, attach
from drank.project.documents import AllocationDocument, Config, read_document
from drank.project.files import FileError
from tests import tiny
from tests.compressed import randomise

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 48,
}
GPT2 = {"n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 2, "vocab_size": 48, "n_positions": 32}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48}
LLAMA_NAMES = (
    "model.layers.{}.self_attn.q_proj",
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)

# model_type, config, then: two modules that share a basis ({} is the layer), two that share one in pivot form, and
# in the first layer the inputs (the first in pivot form) and the output of an MLP that has lost channels.
ARCHITECTURES = {
    "llama": ("llama", LLAMA, *LLAMA_NAMES),
    "llama-tied": ("llama", {**LLAMA, "tie_word_embeddings": True}, *LLAMA_NAMES),
    "qwen2": ("qwen2", {**LLAMA, "num_key_value_heads": 1}, *LLAMA_NAMES),
    "gpt2": ("gpt2", GPT2, "transformer.h.{}.attn.c_attn", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    "opt": (
        "opt",
        {**OPT, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "model.decoder.layers.{}.self_attn.q_proj",
        "self_attn.out_proj",
        ("fc1",),
        "fc2",
    ),
    "gpt_neox": (
        "gpt_neox",
        LLAMA,
        "gpt_neox.layers.{}.attention.query_key_value",
        "attention.dense",
        ("mlp.dense_h_to_4h",),
        "mlp.dense_4h_to_h",
    ),
    "phi3": (
        "phi3",
        {**LLAMA, "pad_token_id": 0},
        "model.layers.{}.self_attn.qkv_proj",
        "self_attn.o_proj",
        ("mlp.gate_up_proj",),
        "mlp.down_proj",
    ),
}
CHANNELS = 22
Q = "model.layers.{}.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def dense_model(architecture, dtype=torch.float32):
    torch.manual_seed(0)
    model_type, options, *_ = ARCHITECTURES[architecture]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options), dtype=dtype).eval()


def spec(model, name, form, rank=None, out_features=None, in_features=None, **more):
    module = model.get_submodule(name)
    n_out, n_in = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    ranked = {} if rank is None else {"rank": rank}
    return {
        "form": form,
        **ranked,
        "out_features": out_features or n_out,
        "in_features": in_features or n_in,
        **more,
    }


def all_forms(model, architecture):
    """Specs with every form: a shared basis, one of rows kept of two modules, an unshared one and a pivot form with
    fewer rows, a dense with fewer columns."""
    _, _, shared, pivot, ups, down = ARCHITECTURES[architecture]
    owner, other = shared.format(0), shared.format(1)
    first, second = (name.removesuffix(shared.split("{}.")[1]) for name in (owner, other))
    channels = 2 * CHANNELS if ups == ("mlp.gate_up_proj",) else CHANNELS
    forms = {first + up: form for up, form in zip(ups, ("pivot", "factors"), strict=False)}
    return {
        owner: spec(model, owner, "factors", 3),
        other: spec(model, other, "factors", 3, basis=owner),
        first + pivot: spec(model, first + pivot, "pivot", 5, basis=first + pivot, first=0, kept=2),
        second + pivot: spec(model, second + pivot, "pivot", 5, basis=first + pivot, first=2, kept=3),
        **{name: spec(model, name, form, 4, out_features=channels) for name, form in forms.items()},
        first + down: spec(model, first + down, "dense", in_features=CHANNELS),
    }


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


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """(architecture, in-memory compressed model, its folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = compressed(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture
def llama(tmp_path):
    """(in-memory compressed llama, its folder), to be spoilt"""
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_reloaded_model_is_the_one_saved_to_the_last_bit(saved):
    _, model, folder = saved
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(logits(reloaded), logits(model))
    assert not any(info.values())
    reloaded.tie_weights()
    assert torch.equal(logits(reloaded), logits(model))


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    _, _, folder = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert files(tmp_path) == files(folder)


def test_shared_basis_is_one_tensor_on_disk_and_one_parameter_in_memory(saved):
    architecture, model, folder = saved
    shared, pivot = ARCHITECTURES[architecture][2:4]
    for template in (f"{shared}.basis", shared.split("{}")[0] + "{}." + f"{pivot}.basis.weight"):
        owner, other = template.format(0), template.format(1)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert owner in file.keys()  # noqa: SIM118
            assert other not in file.keys()  # noqa: SIM118
        for candidate in (model, AutoModelForCausalLM.from_pretrained(folder), copy.deepcopy(model)):
            assert candidate.get_parameter(other) is candidate.get_parameter(owner)


def test_dequantised_model_is_a_plain_one_with_the_same_logits(saved, tmp_path):
    architecture, model, folder = saved
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.dequantize()
    plain.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {type(m) for m in reloaded.modules()} == {type(m) for m in dense_model(architecture).modules()}
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)


def test_generates_what_the_saved_model_generates(saved):
    _, model, folder = saved
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(reloaded.generate(**prompt, **options), model.generate(**prompt, **options))


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_bfloat16_and_shards_survive_the_round_trip(architecture, tmp_path):
    model = compressed(architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    assert {
        buffer.dtype for m in reloaded.modules() for n, buffer in m.named_buffers(recurse=False) if n == "places"
    } == {torch.int32}
    assert torch.equal(logits(reloaded), logits(model))


def test_the_bare_decoder_loads_from_the_same_folder(llama):
    model, folder = llama
    bare = AutoModel.from_pretrained(folder)
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
    _, folder = llama
    again = tmp_path_factory.mktemp("again")

    def add(config):
        config["license"] = {"name": "x"}
        config["modules"][DOWN]["note"] = [1, 2]

    edit_config(folder, add)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    config = json.loads((again / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["license"] == {"name": "x"}
    assert config["modules"][DOWN]["note"] == [1, 2]
    assert config["provenance"] == {"variant": "d-rank-80", "ratios": [0.8]}
    assert (config["quant_method"], config["format_version"]) == ("drank", 2)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (3, "upgrade with 'pip install"),
        (1, "build the folder again"),
        (0, "upgrade"),
        ("1", "upgrade"),
        (None, "upgrade"),
    ],
)
def test_a_format_version_that_is_not_known_is_refused_with_what_to_do(llama, version, remedy):
    _, folder = llama
    edit_config(folder, lambda config: config.update(format_version=version))
    with pytest.raises(FormatError, match=rf"format_version is {version!r}.* reads 2: {remedy}"):
        AutoModelForCausalLM.from_pretrained(folder)


FINE = {"form": "factors", "rank": 3, "out_features": 16, "in_features": 16}


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
        ({"modules": ["a"]}, r"quantization_config\.modules is \['a'\]: Input should be a valid dictionary"),
        ({"modules": "x" * 5000}, r"quantization_config\.modules is 'x+\.\.\.x+': Input should be a valid dict"),
        ({"modules": {"": FINE}}, r"quantization_config\.modules\..*key.* is '': String should have at least 1 char"),
        ({"modules": {3: FINE}}, r"quantization_config\.modules\.3.* is 3: Input should be a valid string"),
        ({"provenance": "someone"}, r"quantization_config\.provenance is 'someone': Input should be a valid dict"),
        ({"provenance": math.nan}, r"quantization_config\.provenance is nan: Input should be a valid dict"),
        ({"to_dict": 1}, r"quantization_config\.to_dict is 1; transformers has a meaning of its own for this name"),
        ({"__class__": "x"}, r"quantization_config\.__class__ is 'x'; transformers has a meaning of its own"),
        ({"specs": "x"}, r"quantization_config\.specs is 'x'; transformers has"),
        ({"dequantize": True}, r"quantization_config\.dequantize is True; transformers has a meaning of its own"),
        ({"format_version": math.nan}, r"quantization_config\.format_version is nan; drank .* reads 2: upgrade"),
        ({"format_version": 10**40}, r"quantization_config\.format_version is 1000.*; drank .* reads 2: upgrade"),
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
    _, folder = llama
    edit_config(folder, lambda config: change(config["modules"]))
    with pytest.raises((FormatError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("key", ["basis", "weight", "places", "coefficients", "basis.weight"])
def test_a_folder_that_lacks_a_tensor_is_refused(llama, key):
    _, folder = llama
    path = folder / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith(f"_proj.{key}"))
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        FormatError, match=rf"{lost.removeprefix('model.')} is in no weight file: the folder is incomplete"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


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
        (one(form=None), r"q_proj\.form is None: Input should be a valid string"),
        (one(form=[]), r"q_proj\.form is \[\]: Input should be a valid string"),
        (one(basis=[1]), r"q_proj\.basis is \[1\]: Input should be a valid string"),
        (one(rank=10**40), "q_proj: rank is 1000.*; it must be an integer of at most 15"),
        (one(out_features=math.inf), r"q_proj\.out_features is inf: Input should be a valid integer"),
        (one(out_features=math.nan), r"q_proj\.out_features is nan: "),
        (one(rank=0), r"q_proj\.rank is 0: Input should be greater than or equal to 1"),
        (one(rank=3.0), r"q_proj\.rank is 3\.0: Input should be a valid integer"),
        (one(rank=True), r"q_proj\.rank is True: Input should be a valid integer"),
        (one(rank=None), "q_proj: rank is None; it must be an integer of at most 15"),
        (one(rank=16), "q_proj: rank is 16; .* at most 15 for 16 x 16 in form 'factors', or form 'dense'"),
        (one(rank=16, form="pivot"), "rank is 16; .* at most 15 for 16 x 16 in form 'pivot'"),
        (one(in_features=0), r"q_proj\.in_features is 0: "),
        (one(out_features=17), r"q_proj: 17 x 16 \(out x in\) is larger .* 16 x 16"),
        ({"model.layers.7.self_attn.q_proj": FINE}, "layers.7.self_attn.q_proj is not in this LlamaForCausalLM"),
        ({"model.layers.0.self_attn": FINE}, "self_attn is LlamaAttention; only nn.Linear and Conv1D"),
        ({"model.embed_tokens": FINE}, "embed_tokens is Embedding"),
        ({"lm_head": {**FINE, "out_features": 48}}, r"lm_head: its weight is also that of another module \(tied\)"),
        ({Q.format(1): {**FINE, "basis": Q.format(0)}}, "basis is .*0.*; the owner of a basis must be among"),
        (two(form="pivot"), "layers.1.*: basis is .*layers.0.*; that module has no basis of its own"),
        (two(rank=4), "layers.1.*: basis is .*layers.0.*; rank and in_features there are 4 and 16; they must be the s"),
        (one(form="dense", basis=Q.format(0)), "layers.0.*: basis is '.*'; form 'dense' shares none"),
        (group({"form": "factors"}, {}), "layers.1.*; that module has no basis of its own to share in form 'pivot'"),
        (group({"basis": None}, {}), "layers.1.*; that module has no basis of its own to share in form 'pivot'"),
        (group({"basis": Q.format(1)}, {}), "layers.0.*; that module has no basis of its own"),
        (group({}, {"form": "factors"}), "layers.1.*; that module has no basis of its own to share in form 'factors'"),
        (group({}, {"basis": DOWN}), "layers.1.*: basis is .*down_proj'; that module has no basis of its own"),
        (group({}, {"basis": Q.format(2)}), "layers.1.*: basis is .*layers.2.*; the owner of a basis must be among"),
        (group({"rank": 4}, {}), "layers.1.*; rank and in_features there are 4 and 16"),
        (group({}, {"in_features": 15}), "layers.1.*; rank and in_features there are 3 and 16"),
        (group({"rank": 16}, {"rank": 16}), "layers.0.*: rank is 16; .* at most 15 .* in form 'pivot'"),
        (group({"in_order": True}, {}), "layers.0.*: in_order is True; only 'pivot' without a shared basis"),
        (one(in_order=True), "layers.0.*: in_order is True; only 'pivot' without a shared basis"),
        (one(form="pivot", in_order=1), r"q_proj\.in_order is 1: Input should be a valid boolean"),
        (group({"first": None}, {}), "layers.0.*: first is None; form 'pivot' needs it here"),
        (group({"first": -1}, {}), r"q_proj\.first is -1: Input should be greater than or equal to 0"),
        (group({}, {"kept": 2.0}), r"q_proj\.kept is 2\.0: Input should be a valid integer"),
        (group({}, {"kept": 17}), "layers.1.*: kept is 17; it must be at most the module's out_features, 16"),
        (group({}, {"first": 0}), "layers.1.*: first is 0, .* before it of the basis of .*layers.0.* end at 1: each"),
        (group({}, {"first": 2}), "layers.1.*: first is 2, but the kept rows before it .* end at 1"),
        (group({"first": 1}, {"first": 2}), "layers.0.*: first is 1, but the kept rows before it .* end at 0"),
        (group({}, {"kept": 1}), "layers.0.*: the modules that share its basis keep 2 rows of 3; .* is one of them mi"),
        (group({}, {"kept": 3}), "layers.0.*: the modules that share its basis keep 4 rows of 3"),
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
    model = dense_model("llama")
    specs = {DOWN: spec(model, DOWN, "factors", 4)}
    attach(model, specs, {})
    with pytest.raises(FormatError, match=r"down_proj is FactorLinear; only nn\.Linear"):
        attach(model, specs, {})


@torch.no_grad()
def grouped_llama(rank=12):
    """A tiny llama whose two q_proj share a basis of rows, and the same model with the stack's best rank-k weights
    in dense modules."""
    model, dense = tiny.llama(), tiny.llama()
    names = [Q.format(layer) for layer in (0, 1)]
    stack = torch.cat([model.get_submodule(name).weight for name in names]).double()
    U, S, Vh = torch.linalg.svd(stack, full_matrices=False)
    form = pivot_rows(U[:, :rank] * S[:rank], Vh[:rank])
    members = dict(zip(names, split_group(form, [32, 32]), strict=True))
    specs = {
        name: spec(model, name, "pivot", rank, basis=names[0], first=m.first, kept=len(m.order) - len(m.coefficients))
        for name, m in members.items()
    }
    attach(model, specs, {})
    model.get_submodule(names[0]).basis.weight.copy_(form.kept)
    for name, member in members.items():
        model.get_submodule(name).weight.copy_(member.coefficients)
        model.get_submodule(name).places.copy_(places(member.order))
    for name, block in zip(names, (U[:, :rank] * S[:rank] @ Vh[:rank]).split(32), strict=True):
        dense.get_submodule(name).weight.copy_(block)
    return model, dense


def test_a_group_over_two_layers_in_pivot_form_is_the_low_rank_model(tmp_path):
    model, dense = grouped_llama()
    model.save_pretrained(tmp_path / "grouped")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grouped")
    torch.testing.assert_close(logits(reloaded), logits(dense), rtol=0, atol=1e-5)
    assert torch.equal(logits(reloaded), logits(model))
    tensors = load_file(tmp_path / "grouped" / "model.safetensors")
    floats = [tensor.numel() for key, tensor in tensors.items() if "q_proj" in key and "places" not in key]
    assert sum(floats) == 12 * (2 * 32 + 32 - 12)
    reloaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "grouped")
    reloaded.dequantize()
    assert type(reloaded.get_submodule(Q.format(1))) is nn.Linear
    torch.testing.assert_close(logits(reloaded), logits(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [((0, 0), (0, 3)), ((0, 3), (3, 0)), ((1, 2), (0, 1))])
def test_the_modules_of_a_group_keep_any_share_of_its_rows(first, second, tmp_path):
    changes = [dict(zip(("first", "kept"), rows, strict=True)) for rows in (first, second)]
    model = compressed("llama", group(*changes))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_modules_all_of_whose_rows_are_kept_survive_the_round_trip(tmp_path):
    model = dense_model("llama")
    names = [f"model.layers.{layer}.self_attn.{role}_proj" for layer in (0, 1) for role in ("k", "v")]
    # Three smaller modules, whole in the basis: their coefficients are empty tensors.
    specs = {
        name: spec(model, name, "pivot", 15, out_features=size, basis=names[0], first=first, kept=kept)
        for name, size, first, kept in zip(names, (16, 4, 3, 3), (0, 5, 9, 12), (5, 4, 3, 3), strict=True)
    }
    compressed("llama", specs).save_pretrained(tmp_path / "first")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    reloaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "first")
    assert all(reloaded.get_submodule(name).dense_weight().isfinite().all() for name in names)


def test_loading_a_dense_folder_does_not_compress_it(tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=DrankConfig())


LOAD = "AutoModelForCausalLM.from_pretrained(folder)"


def test_without_drank_loading_fails_and_importing_it_then_is_enough(tmp_path):
    for architecture in ("llama", "gpt2"):
        model = dense_model(architecture)
        for form in ("factors", "pivot", "dense"):
            specs = all_forms(model, architecture).items()
            chosen = {name: s for name, s in specs if s["form"] == form and "basis" not in s}
            compressed(architecture, chosen).save_pretrained(tmp_path / f"{architecture}-{form}")
        grouped = {name: s for name, s in specs if s["form"] == "pivot" and "basis" in s}
        compressed(architecture, grouped).save_pretrained(tmp_path / f"{architecture}-group")
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        f"    try: {LOAD}\n"
        "    except RuntimeError as error: assert 'ignore_mismatched_sizes' in str(error), error\n"
        "    else: raise SystemExit(f'{folder} was loaded without drank')\n"
        "import drank\n"
        f"for folder in sys.argv[1:]: {LOAD}\n"
    )
    result = python(code, *sorted(tmp_path.iterdir()))
    assert result.returncode == 0, result.stderr


def test_importing_drank_first_is_light_and_enough(llama):
    _, folder = llama
    code = (
        "import sys, drank\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'import drank is heavy'\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        f"{LOAD}\n"
    )
    result = python(code, folder)
    assert result.returncode == 0, result.stderr
