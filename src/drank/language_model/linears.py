"""The linears of a decoder: which are compressed, what each one does, and which of them read the same tensor.

The one place with knowledge of model architectures. Sizes come from the modules themselves and shared inputs from one
probing forward pass; only the *role* of a linear (needed by rules that speak of queries, keys and values) is looked up.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Last part of a module's name, or last two, -> role. A linear that is not listed is compressed like any other; only
# rules that name a role (query/key -> value rebalancing, groups, MLPs that lose channels) pass it by.
ROLES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "out_proj": "output",
    "qkv_proj": "query_key_value",
    "query_key_value": "query_key_value",
    "c_attn": "query_key_value",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "fc1": "up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "fc2": "down",
    "dense_4h_to_h": "down",
    "attn.c_proj": "output",
    "mlp.c_proj": "down",
}


class NoTargetsError(ValueError):
    """Nothing in the model matches the patterns of linears to compress."""


@dataclass(frozen=True)
class Linear:
    """A targeted linear layer y = W x: where it is and what it does. `kind` is the last part of its name."""

    name: str
    kind: str
    role: str | None
    layer: int
    out_features: int
    in_features: int
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W with shape (out, in); transformers' Conv1D stores the transpose."""
        weight = self.module.get_parameter("weight")
        return weight.T if is_conv1d(self.module) else weight


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2 style linears: transformers' Conv1D, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def find_linears(model: nn.Module, targets: Sequence[str], ignore: Sequence[str] = ()) -> list[Linear]:
    """Linears to compress, in the model's order. The output head and anything outside a numbered layer is never one.

    Args:
        targets: suffixes of module names (``q_proj``, ``mlp.up_proj``), or regular expressions behind ``re:`` that
            match the whole name.
        ignore: patterns of the same kind, taken out again.

    Raises:
        NoTargetsError: nothing is left; the message lists the kinds of linears that the model has.
    """
    found = [
        Linear(name, name.rsplit(".", 1)[-1], role_of(name), layer, *_shape(module), module)
        for name, module in _linear_modules(model)
        if (layer := layer_index(name)) is not None
    ]
    chosen = [
        linear
        for linear in found
        if any(_matches(p, linear.name) for p in targets) and not any(_matches(p, linear.name) for p in ignore)
    ]
    if not chosen:
        kinds = ", ".join(sorted({linear.kind for linear in found})) or "none"
        raise NoTargetsError(
            f"no linear layer matches targets {list(targets)} without ignore {list(ignore)}; "
            f"kinds of linears in the layers of this model: {kinds}"
        )
    return chosen


def role_of(name: str) -> str | None:
    """What a linear of that dotted name does; None where the table does not say."""
    parts = name.split(".")
    return ROLES.get(".".join(parts[-2:]), ROLES.get(parts[-1]))


def layer_index(name: str) -> int | None:
    """Index of the decoder layer in a dotted name: its first number; None where there is none."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


@torch.no_grad()
def shared_inputs(model: nn.Module, linears: Sequence[Linear], ids: Tensor) -> dict[str, str]:
    """For each linear the name of the first linear that reads the same tensor (itself, where it reads alone).

    Found by looking, not by name: one forward pass over ids (batch, tokens), comparing the very tensor objects.

    Raises:
        ValueError: a linear is not reached by the forward pass (an expert that saw no token, say).
    """
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: seen.update({name: seen.get(name, args[0])})

    handles = [linear.module.register_forward_pre_hook(remember(linear.name)) for linear in linears]
    try:
        model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    missed = [linear.name for linear in linears if linear.name not in seen]
    if missed:
        raise ValueError(f"no input reached {', '.join(missed[:3])} ({len(missed)} linears): list them under `ignore`")
    owners: dict[int, str] = {}
    return {linear.name: owners.setdefault(id(seen[linear.name]), linear.name) for linear in linears}


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    head_of: Any = getattr(model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    for name, module in model.named_modules():
        if module is not head and (isinstance(module, nn.Linear) or is_conv1d(module)):
            yield name, module


def _shape(module: nn.Module) -> tuple[int, int]:
    if is_conv1d(module):
        n_in, n_out = module.get_parameter("weight").shape
        return n_out, n_in
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith("." + pattern)
