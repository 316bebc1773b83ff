"""Where does a step of healing spend its time? Ratios to the step as it is.

``python -m benchmarks.healing_step``. A random Llama of SmolLM2-135M's sizes learns its teacher's predictions of 1,024
tokens, by a matrix of its own in every layer and no more. The ways take turns: plain attention in the place of torch's
fused one, windows of 512 tokens in the place of 256, and the divergence by torch's autograd in the place of ours.
The limit is the products' arithmetic at the speed of a large product.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import arguments, begin, interleaved, print_table, product, ratios, shown
from drank.model.divergence import divergence

TOKENS, VOCABULARY, SIDE = 1024, 49152, 1536


def model(n_layers: int, dtype: torch.dtype) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": n_layers,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).requires_grad_(False)


def by_autograd(expected: Tensor, found: Tensor) -> Tensor:
    p, q = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="sum") / len(found)


def step(student: Any, teacher: Any, attention: str, length: int, loss: Any) -> None:
    ids = torch.arange(TOKENS).view(-1, length) % VOCABULARY
    for each in (student, teacher):
        each.set_attn_implementation(attention)
    with torch.inference_mode():
        expected = teacher(input_ids=ids, use_cache=False).logits
    found = student(input_ids=ids, use_cache=False).logits
    torch.stack([loss(theirs, ours) for theirs, ours in zip(expected, found, strict=True)]).mean().backward()
    student.zero_grad(set_to_none=True)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    asked = parser.parse_args()
    begin(asked)
    dtype = getattr(torch, asked.dtype)
    student, teacher = model(asked.layers, dtype), model(asked.layers, dtype)
    for layer in student.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    taken = partial(step, student, teacher)
    ways = {
        "as it is": partial(taken, "sdpa", 256, divergence),
        "plain attention": partial(taken, "eager", 256, divergence),
        "windows of 512": partial(taken, "sdpa", 512, divergence),
        "divergence by autograd": partial(taken, "sdpa", 256, by_autograd),
        "both": partial(taken, "sdpa", 512, by_autograd),
        "product": product(dtype, SIDE),
    }
    times = interleaved(ways, asked.rounds)
    # Forward of the teacher, forward and backward to the inputs of the student, and the gradients of one matrix.
    weights = sum(p.numel() for p in teacher.parameters() if p.ndim == 2)
    one = sum(layer.self_attn.q_proj.weight.numel() for layer in student.model.layers)
    speed = TOKENS * (3 * weights + one) / SIDE**3
    rows = [[name, shown(ratios(times, name, "as it is"))] for name in ways if name != "product"]
    rows.append(["limit", shown([ratio * speed for ratio in ratios(times, "product", "as it is")])])
    print_table(["a step of 1,024 tokens", "ratio of times"], rows)


if __name__ == "__main__":
    main()
