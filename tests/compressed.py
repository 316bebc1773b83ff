"""Small compressed folders: every form, two layers of unequal MLPs, Linear and Conv1D."""

import torch

from drank.model.quantizer import attach, swap_modules
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


def write(dense, specs, folder):
    """A folder with random factors, biases and orders in the place of what these specs name."""
    model = swap_modules(dense, specs)
    with torch.no_grad():
        for name in specs:
            module = model.get_submodule(name)
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
            if getattr(module, "places", None) is not None:
                module.places.copy_(torch.randperm(module.out_features))
    attach(model, specs, PROVENANCE).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
