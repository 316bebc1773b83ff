"""ONNX: a folder for ONNX Runtime and onnxruntime-genai, with the factors in its graph."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drank.project.files import write_json
from drank.serving.graph import CachedDecoder, example, graph_model, load

GRAPH = "model.onnx"
BLOCK = 32  # neighbours in a row that share a scale in int8; ranks of preset kfac are multiples of it
ZERO = 128  # the integer that stands for 0, ONNX Runtime's where none is given


def write(model: Path, folder: Path, *, bits: int = 32, int8: bool = False, provenance: Mapping[str, str]) -> None:
    """Write a compressed or dense model into an empty folder, ready for onnxruntime-genai.

    `model.onnx` (weights in `model.onnx.data`) has inputs `input_ids`, `attention_mask`, `position_ids` and
    `past_key_values.N.key` and `.value`, outputs `logits` (batch, 1, tokens), those of the last position, and
    `present.N.key` and `.value`. `genai_config.json`, config.json and the tokenizer are beside it.

    Args:
        bits: 32, or 16 for float16: half the size. ONNX Runtime's CPU has few operations in it, and none in bfloat16.
        int8: linears and embeddings as integers of 8 bits with a scale per 32 neighbours in a row (``MatMulNBits``).
        provenance: put into the graph's metadata_props as it is.

    Raises:
        GraphError: a model whose graph cannot be written; the message says why.
    """
    from transformers import AutoTokenizer

    loaded = graph_model(load(model, bits))
    arguments = example(loaded)
    program = exported(in_int8(loaded) if int8 else loaded, arguments)
    program.model.metadata_props.update(provenance)
    program.save(folder / GRAPH, external_data=True)
    heads, width = arguments[3][0][0].shape[1::2]
    write_json(folder / "genai_config.json", genai_config(loaded, heads, width))
    loaded.config.__dict__.pop("quantization_config", None)  # the graph has no modules to build
    loaded.config.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False).save_pretrained(folder)


def genai_config(model: Any, heads: int, width: int) -> dict[str, Any]:
    """``genai_config.json`` of a graph of :func:`exported`, whose cache has this many heads of this width.

    The search is that of the model's generation config: greedy unless that samples.
    """
    config, generation = model.config.get_text_config(), model.generation_config
    search = {key: getattr(generation, key, None) for key in ("temperature", "top_k", "top_p", "repetition_penalty")}
    length = config.max_position_embeddings
    return {
        "model": {
            "type": "decoder",  # any decoder whose inputs and outputs are named below
            **_special(config.vocab_size, generation),
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": GRAPH,
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.do_sample),
            "max_length": length,
            "past_present_share_buffer": False,  # the graph returns a longer cache and leaves the one it got alone
        }
        | {key: value for key, value in search.items() if value is not None},
    }


def in_int8(model: Any) -> Any:
    """The model of :func:`graph_model` with linears and embeddings in 8 bits, in place; a shared matrix once.

    Only for an export: ``MatMulNBits`` is ONNX Runtime's, and torch gives zeros for it.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            continue
        weight = module.weight
        if id(weight) not in made:
            made[id(weight)] = rounded(weight.T if isinstance(module, Conv1D) else weight)
        if isinstance(module, nn.Embedding):
            model.set_submodule(name, Int8Embedding(*made[id(weight)], weight.shape[1]))
        else:
            n_in = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
            model.set_submodule(name, Int8Linear(*made[id(weight)], n_in, module.bias))
    return model


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (out, blocks, 32) uint8, whose 128 is 0, and scales (out, blocks): w = s (q - 128), nearest."""
    blocks = F.pad(weight.detach().float(), (0, -weight.shape[1] % BLOCK)).view(len(weight), -1, BLOCK)
    scales = blocks.abs().amax(-1) / (ZERO - 1)
    q = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round() + ZERO
    return q.to(torch.uint8), scales.to(weight.dtype)


class Int8Linear(nn.Module):
    """A linear of (out, in) numbers in 8 bits. ONNX Runtime rounds what it is multiplied by to 8 bits, too."""

    q: Tensor
    scales: Tensor

    def __init__(self, q: Tensor, scales: Tensor, n_in: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.n_in, self.bias = n_in, bias
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        n_out = len(self.q)
        sizes: dict[str, Any] = {"K": self.n_in, "N": n_out, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", (x, self.q, self.scales), sizes,
            dtype=x.dtype, shape=(*x.shape[:-1], n_out), version=1,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias


class Int8Embedding(nn.Module):
    """Embeddings (tokens, width) in the integers of an :class:`Int8Linear`; only rows looked up are multiplied out."""

    q: Tensor
    scales: Tensor

    def __init__(self, q: Tensor, scales: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("q", q)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        numbers = (self.q[ids].to(self.scales.dtype) - ZERO) * self.scales[ids][..., None]
        return numbers.flatten(-2)[..., : self.width]


def exported(model: Any, arguments: tuple[Any, ...]) -> Any:
    """The program of torch.onnx, whose batch, number of tokens and length of cache are free."""
    n_layers = len(arguments[3])
    ids = {0: "batch", 1: "sequence"}
    cache = {0: "batch", 2: "past"}
    names = [f"{{}}.{layer}.{kind}" for layer in range(n_layers) for kind in ("key", "value")]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that several axes have, which is meant
        return torch.onnx.export(
            CachedDecoder(model),
            arguments,
            dynamo=True,
            verbose=False,
            opset_version=23,  # the first with Attention
            dynamic_shapes=(ids, {0: "batch", 1: "total"}, ids, [(cache, cache)] * n_layers),
            input_names=["input_ids", "attention_mask", "position_ids", *(n.format("past_key_values") for n in names)],
            output_names=["logits", *(n.format("present") for n in names)],
        )


def _special(n_tokens: int, generation: Any) -> dict[str, Any]:
    """Ids of special tokens, as onnxruntime-genai wants them: all there, and ones that the model has."""

    def ids(name: str) -> list[int]:
        found = getattr(generation, name)
        return [i for i in (found if isinstance(found, list) else [found]) if i is not None and i < n_tokens]

    end = ids("eos_token_id") or [n_tokens - 1]
    pad, begin = ids("pad_token_id") or end, ids("bos_token_id") or end
    return {"bos_token_id": begin[0], "eos_token_id": end, "pad_token_id": pad[0]}
