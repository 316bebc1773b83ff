"""torch.export of every form, which ONNX, OpenVINO and AOTInductor stand on."""

import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from drank.method.precisions import Grid
from drank.model.layers import RoundedEmbedding, RoundedLinear
from drank.serving.graph import CachedDecoder, GraphError, example, graph_model, load
from tests import graphs
from tests.compressed import randomise
from tests.test_modules import FACTORS, IN_ORDER, PIVOT, SHARED

N_IN = 24


def few(kind, **keys):
    """A layer of 4 bits of random integers."""
    module = kind(N_IN, 20, 9, True, dtype=torch.float32, grid=Grid(4, 8), **keys)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data.random_(0, 256)
    return module


def eight():
    """An embedding of 8 bits."""
    module = RoundedEmbedding(N_IN, 20, dtype=torch.float32)
    module.weight.data.random_(-127, 128)
    nn.init.normal_(module.weight_scales, std=0.1)
    return module


LAYERS = {
    "factors": lambda: randomise(FACTORS(N_IN, 20, 9, True)),
    "pivot": lambda: randomise(PIVOT(N_IN, 20, 9, True)),
    "pivot in order": lambda: randomise(IN_ORDER(N_IN, 20, 9, False)),
    "shared pivot": lambda: randomise(SHARED(N_IN, 20, 9, True)),
    "factors of 4 bits": lambda: few(FACTORS),
    "pivot of 4 bits": lambda: few(PIVOT),
    "linear of 4 bits": lambda: few(RoundedLinear),
    "embedding of 8 bits": eight,
}  # A head of 8 bits asks how many tokens there are, so that its program is for one number; graphs have a plain one.


@torch.no_grad()
@pytest.mark.parametrize("form", LAYERS)
def test_a_layer_saved_as_a_program_computes_the_same_for_any_number_of_tokens(form, tmp_path):
    layer = LAYERS[form]().eval()
    inputs = [torch.randint(20, (2, n)) if "embedding" in form else torch.randn(2, n, N_IN) for n in (5, 7)]
    free = {0: Dim("batch", max=8), 1: Dim("tokens", max=64)}
    torch.export.save(torch.export.export(layer, (inputs[0],), dynamic_shapes=(free,)), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    for x in inputs:
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", graphs.MODELS)
def test_a_decoder_with_its_cache_as_a_program_computes_what_the_model_computes(name, tmp_path):
    folder = graphs.write(name, tmp_path)
    model = graph_model(load(folder))
    arguments = example(model)
    D, n = Dim.DYNAMIC, len(arguments[3])
    shapes = ({0: D, 1: D}, {0: D, 1: D}, {0: D, 1: D}, [({0: D, 2: D}, {0: D, 2: D})] * n)
    exported = torch.export.export(CachedDecoder(model), arguments, dynamic_shapes=shapes, strict=False)
    torch.export.save(exported, tmp_path / "decoder.pt2")
    # torch 2.13 counts arguments wrongly in its checks of sizes where one is a list.
    program = torch.export.load(tmp_path / "decoder.pt2").module(check_guards=False)
    ids, cache = graphs.prompt(), [tuple(each[:1, :, :0] for each in pair) for pair in arguments[3]]
    positions = torch.arange(9)[None]
    _, cache = program(ids[:, :6], torch.ones(1, 6, dtype=torch.long), positions[:, :6], cache)
    logits, _ = program(ids[:, 6:], torch.ones(1, 9, dtype=torch.long), positions[:, 6:], cache)
    torch.testing.assert_close(logits[:, 0], graphs.loaded(folder)(ids).logits[:, -1], rtol=1e-5, atol=2e-5)


def tiny_of(kind, **more):
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256, **more}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).eval()


HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "mistral": {"sliding_window": 4, **HEADS},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, **HEADS},
    "qwen2": {**HEADS},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_windows_caps_and_biases_of_attention_are_in_the_graph(kind, tmp_path):
    model = tiny_of(kind, **FAMILIES[kind])
    model.save_pretrained(tmp_path)
    ids, positions = graphs.prompt(12), torch.arange(12)[None]
    expected = model(ids).logits[:, -1]
    decoder = CachedDecoder(graph_model(load(tmp_path)))
    *_, past = example(decoder.model)
    cache = [tuple(each[:1, :, :0] for each in pair) for pair in past]
    for part in (slice(7), slice(7, 12)):
        seen = torch.ones(1, part.stop, dtype=torch.long)
        logits, cache = decoder(ids[:, part], seen, positions[:, part], cache)
    torch.testing.assert_close(logits[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_memory_that_is_not_keys_and_values_is_refused_by_name(tmp_path):
    tiny_of("mamba", state_size=4).save_pretrained(tmp_path)
    with pytest.raises(GraphError, match="MambaForCausalLM: 0 of its 2 layers have keys and values"):
        example(graph_model(load(tmp_path)))


@torch.no_grad()
def test_aotinductor_compiles_every_form(tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler, which AOTInductor needs")
    layers = [make() for form, make in LAYERS.items() if "embedding" not in form]

    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            return torch.stack([layer(x) for layer in self.layers])

    every, free = All().eval(), {0: Dim("tokens", min=2, max=64)}
    exported = torch.export.export(every, (torch.randn(5, N_IN),), dynamic_shapes=(free,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layers.pt2"))
    x = torch.randn(7, N_IN)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), every(x), rtol=0, atol=1e-4)


def test_numbers_that_no_graph_computes_in_are_refused(tmp_path):
    with pytest.raises(GraphError, match="bits is 4; a graph has floating-point numbers of 32 or 16 bits"):
        load(tmp_path, 4)
