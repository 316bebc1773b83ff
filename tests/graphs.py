"""Shared by tests of graphs: folders of every form, and decoding by a graph's inputs and outputs alone."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drank.model.quantizer import attach
from tests import compressed, tiny
from tests.compressed import spec

Q = "model.layers.{}.self_attn.q_proj"
FEW = {"bits": 4, "group": 16}
# Shared pivot rows, whole linears and factors of few bits, embeddings in 8 with the head tied to them.
BITS = {
    Q.format(0): spec("pivot", 32, 32, 9, basis=Q.format(0), first=0, kept=5),
    Q.format(1): spec("pivot", 32, 32, 9, basis=Q.format(0), first=5, kept=4),
    "model.layers.0.self_attn.v_proj": spec("factors", 16, 32, 6, **FEW),
    "model.layers.1.self_attn.v_proj": spec("dense", 16, 32, bits=3, group=16),
    "model.layers.0.mlp.up_proj": spec("pivot", 40, 32, 7, **FEW),
    "model.layers.0.mlp.gate_proj": spec("pivot", 40, 32, 12, in_order=True, bits=8, group=32),
    "model.layers.0.mlp.down_proj": spec("dense", 32, 40),
    "model.embed_tokens": spec("embedding", 320, 32, bits=8),
}
MODELS = compressed.MODELS | {"few bits": (tiny.llama, BITS)}


@torch.no_grad()
def write(name, folder):
    """A folder of these specs with random numbers and orders."""
    torch.manual_seed(0)
    dense, specs = MODELS[name]
    model = attach(dense(), specs, compressed.PROVENANCE)
    for module in map(model.get_submodule, specs):
        for parameter in module.parameters():
            low = -127 if parameter.dtype == torch.int8 else 0
            if parameter.is_floating_point():
                parameter.normal_(std=0.05 if any(p.dtype != parameter.dtype for p in module.parameters()) else 0.3)
            else:
                parameter.random_(low, low + 255)
        if getattr(module, "places", None) is not None:
            module.places.copy_(torch.randperm(module.out_features))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(n=9):
    return torch.arange(40, 40 + n)[None]


@torch.no_grad()
def generated(folder, ids, n):
    """The n tokens that `generate` continues with, greedily, whatever ends a text."""
    options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "attention_mask": torch.ones_like(ids)}
    return loaded(folder).generate(ids, **options)[0, ids.shape[1] :].tolist()


def feed(shapes, ids, past=None, mask=None, dtype=np.float32):
    """Inputs of a pass over ids (batch, n); ``shapes`` has heads and width of each cached tensor by its name."""
    ids = np.asarray(ids, np.int64)
    empty = {name: np.zeros((len(ids), heads, 0, width), dtype) for name, (heads, width) in shapes.items()}
    past = empty if past is None else past
    seen = next(iter(past.values())).shape[2]
    mask = np.ones((len(ids), seen + ids.shape[1]), np.int64) if mask is None else mask
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, seen:]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


def greedy(run, shapes, ids, n):
    """n tokens, each of a pass over the last alone; ``run`` gives outputs in the graph's order for such inputs."""
    tokens, past = [], None
    for _ in range(n):
        logits, *cache = run(feed(shapes, ids, past))
        past = dict(zip(shapes, cache, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        ids = [[tokens[-1]]]
    return tokens


def error(found, expected):
    """Root mean square difference over the deviation of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())
