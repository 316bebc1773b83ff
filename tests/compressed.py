"""Small compressed folders and layers: every form, two layers of unequal MLPs, Linear and Conv1D."""

import torch

from drank.model.format import SCALES
from drank.model.quantizer import attach
from tests import tiny

PROVENANCE = {"variant": "kfac-80", "allocation_sha256": "0" * 64, "base_model_sha256": "1" * 64}


def spec(form, out_features, in_features, rank=None, **more):
    sizes = {"form": form, "out_features": out_features, "in_features": in_features, **more}
    return sizes if rank is None else sizes | {"rank": rank}


# Two layers whose MLPs keep 40 and 24 channels of 64 (gpt2: of 128), which no plain config can say; every form.
LLAMA = {
    "model.layers.0.self_attn.q_proj": spec("factors", 32, 32, 9),
    "model.layers.1.self_attn.q_proj": spec("factors", 32, 32, 9, basis="model.layers.0.self_attn.q_proj"),
    "model.layers.0.mlp.gate_proj": spec("pivot", 40, 32, 12, in_order=True),
    "model.layers.0.mlp.up_proj": spec("pivot", 40, 32, 7),
    "model.layers.0.mlp.down_proj": spec("dense", 32, 40),
    "model.layers.1.mlp.gate_proj": spec("dense", 24, 32),
    "model.layers.1.mlp.up_proj": spec("factors", 24, 32, 7),
    "model.layers.1.mlp.down_proj": spec("factors", 32, 24, 5),
}
GPT2 = {
    "transformer.h.0.attn.c_attn": spec("factors", 96, 32, 9),
    "transformer.h.0.mlp.c_fc": spec("pivot", 40, 32, 12),
    "transformer.h.0.mlp.c_proj": spec("pivot", 32, 40, 11),
    "transformer.h.1.mlp.c_fc": spec("factors", 24, 32, 7),
    "transformer.h.1.mlp.c_proj": spec("dense", 32, 24),
}
MODELS = {"llama": (tiny.llama, LLAMA), "gpt2": (tiny.gpt2, GPT2)}


def filled(kind, tensors, **keys):
    """A layer of that class from its tensors by name; a Parameter is taken as it is, so that layers can share it."""
    shapes = {name: torch.as_tensor(tensor).shape for name, tensor in tensors.items()}
    (basis,) = [shapes[name] for name in ("basis", "basis.weight", "weight") if name in shapes][:1]
    n_out = next(shapes[name][0] for name in ("places", "bias", "weight") if name in shapes)
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    module = kind(basis[1], n_out, basis[0], "bias" in tensors, dtype=dtype, **keys)
    module.load_state_dict(tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, tensor)
    return module


@torch.no_grad()
def randomise(module):
    """Random parameters, integers of few bits too, and, where there is one, a random order of outputs."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            parameter.random_()
        else:
            parameter.normal_(std=0.003 if name.endswith(SCALES) else 0.3)
    if getattr(module, "places", None) is not None:
        module.places.copy_(torch.randperm(module.out_features))
    return module


def write(dense, specs, folder):
    """A folder with random factors, biases and orders in the place of what these specs name."""
    model = attach(dense, specs, PROVENANCE)
    for name in specs:
        randomise(model.get_submodule(name))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def write_all(models, factory):
    """A folder per name of (dense model's maker, specs); ``factory`` is pytest's tmp_path_factory."""
    return {name: write(dense(), specs, factory.mktemp(name)) for name, (dense, specs) in models.items()}
