r"""The order of an MLP's channels is free: where that saves the output order of a pivot layer, it is changed.

With a nonlinearity that acts on each channel alone, an MLP is a sum over its channels,

.. math:: y = \sum_j \mathrm{down}_{:,j}\; φ(\mathrm{gate}_{j,:} x,\; \mathrm{up}_{j,:} x)

so they may be numbered as one of the matrices before the nonlinearity computes them. That one needs no `places`; the
others put theirs in this order, for nothing where they are no pivot layers, and the columns of down follow.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from drank.model.groups import Mlp, find_mlps
from drank.model.linears import find_linears, is_conv1d
from drank.model.stored import Stored

# By form, the tensor whose columns are input channels, and the one whose rows are output channels.
INPUT_SIDE = {"factors": "basis", "pivot": "weight", "dense": "weight"}
OUTPUT_SIDE = {"factors": "weight", "pivot": "places", "dense": "weight"}


@torch.no_grad()
def fold_channel_order(model: nn.Module, stored: Iterable[Stored]) -> list[Stored]:
    """The same modules, with one `places` less in each MLP that has any; modules left as they are change in place.

    Left alone are MLPs with a basis shared between layers, which would have to follow two orders, and those with
    parameters of their own between the matrices, which may be one a channel.
    """
    by_name = {module.name: module for module in stored}
    for mlp in find_mlps(model, find_linears(model, ["re:.*"])):
        leader = next((m for m in _stored(mlp, by_name) if m.spec["form"] == "pivot"), None)
        if leader is None or leader.name == mlp.down.name or not _foldable(model, mlp, by_name):
            continue
        order = leader.tensors["places"].long().argsort()
        for linear in mlp.before:
            _reorder_outputs(linear.module, linear.name, by_name, order)
        _reorder_inputs(mlp.down.module, mlp.down.name, by_name, order)
        kept = {key: tensor for key, tensor in by_name[leader.name].tensors.items() if key != "places"}
        by_name[leader.name] = Stored(leader.name, leader.spec | {"in_order": True}, kept)
    return list(by_name.values())


def _stored(mlp: Mlp, by_name: dict[str, Stored]) -> list[Stored]:
    return [by_name[linear.name] for linear in (*mlp.before, mlp.down) if linear.name in by_name]


def _foldable(model: nn.Module, mlp: Mlp, by_name: dict[str, Stored]) -> bool:
    own = {
        f"{linear.name.rpartition('.')[2]}.{kind}" for linear in (*mlp.before, mlp.down) for kind in ("weight", "bias")
    }
    others = {name for name, _ in model.get_submodule(mlp.name).named_parameters()} - own
    return not others and not any("basis" in module.spec for module in _stored(mlp, by_name))


def _reorder_outputs(module: Any, name: str, by_name: dict[str, Stored], order: Tensor) -> None:
    if name not in by_name:
        weight = module.weight
        weight.copy_(weight[:, order] if is_conv1d(module) else weight[order])
        if module.bias is not None:
            module.bias.copy_(module.bias[order])
        return
    old = by_name[name]
    side = OUTPUT_SIDE[old.spec["form"]]
    tensors = old.tensors | {side: old.tensors[side][order]}
    bias = old.tensors.get("bias", module.bias)
    if bias is not None:
        tensors["bias"] = bias[order]
    by_name[name] = replace(old, tensors=tensors)


def _reorder_inputs(module: Any, name: str, by_name: dict[str, Stored], order: Tensor) -> None:
    if name not in by_name:
        weight = module.weight
        weight.copy_(weight[order] if is_conv1d(module) else weight[:, order])
        return
    old = by_name[name]
    side = INPUT_SIDE[old.spec["form"]]
    by_name[name] = replace(old, tensors=old.tensors | {side: old.tensors[side][:, order]})
