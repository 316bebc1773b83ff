r"""The order of an MLP's channels is free: where that saves the output order of a pivot layer, it is changed.

With a nonlinearity that acts on each channel alone, an MLP is a sum over its channels,

.. math:: y = \sum_j \mathrm{down}_{:,j}\; φ(\mathrm{gate}_{j,:} x,\; \mathrm{up}_{j,:} x)

so they may be numbered as one of the matrices before the nonlinearity computes them. That one needs no `places`; the
others put theirs in this order, for nothing where they are no pivot layers, and the columns of down follow.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from drank.model.groups import Mlp, find_mlps
from drank.model.layers import FORMS
from drank.model.linears import Linear, find_linears

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Origin:
    """The matrix that a module stands for, which rounding looks at again.

    Attributes:
        weight: (out, in), before any rank was reduced.
        outputs, inputs: for each of its rows and columns, the number of that feature in the base model.
    """

    weight: Tensor
    outputs: Tensor
    inputs: Tensor

    def renumbered(self, order: Tensor, outputs: bool) -> "Origin":
        """The same with its output or input features in this order."""
        if outputs:
            return replace(self, weight=self.weight[order], outputs=self.outputs[order])
        return replace(self, weight=self.weight[:, order], inputs=self.inputs[order])


@dataclass(frozen=True)
class Stored:
    """A module before it is put into the model: its spec for config.json, and its tensors by name.

    Weights are (out, in), Conv1D's too. ``origin`` is there if the tensors are going to be rounded.
    """

    name: str
    spec: dict[str, Any]
    tensors: Tensors
    origin: Origin | None = None


@torch.no_grad()
def fold_channel_order(model: nn.Module, stored: Iterable[Stored]) -> list[Stored]:
    """The same modules, with one `places` less in each MLP that has any; modules left as they are change in place.

    MLPs with a basis shared between layers, which would have to follow two orders, are left alone. So are those with
    parameters per channel besides, which :func:`find_mlps` does not give, and those with a fused gate and up
    projection, whose halves have to keep one order.
    """
    by_name = {module.name: module for module in stored}
    for mlp in find_mlps(model, find_linears(model, ["re:.*"])):
        leader = next((by_name[x.name] for x in mlp.before if "places" in _tensors(x.name, by_name)), None)
        if leader is None or not _foldable(mlp, by_name):
            continue
        order = leader.tensors["places"].long().argsort()
        for linear in mlp.before:
            _reorder(linear, by_name, order, outputs=True)
        _reorder(mlp.down, by_name, order, outputs=False)
        leader = by_name[leader.name]
        kept = {key: tensor for key, tensor in leader.tensors.items() if key != "places"}
        by_name[leader.name] = replace(leader, spec=leader.spec | {"in_order": True}, tensors=kept)
    return list(by_name.values())


def _tensors(name: str, by_name: dict[str, Stored]) -> Tensors:
    return by_name[name].tensors if name in by_name else {}


def _foldable(mlp: Mlp, by_name: dict[str, Stored]) -> bool:
    specs = [by_name[linear.name].spec for linear in (*mlp.before, mlp.down) if linear.name in by_name]
    fused = any(linear.role == "gate_up" for linear in mlp.before)
    return not fused and all("basis" not in spec and all(_sides(spec["form"])) for spec in specs)


def _sides(form: str) -> tuple[str | None, str | None]:
    """The tensor whose columns are input channels, and the one whose rows are output channels."""
    return ("weight", "weight") if form == "dense" else (FORMS[form].columns, FORMS[form].rows)


def _reorder(linear: Linear, by_name: dict[str, Stored], order: Tensor, outputs: bool) -> None:
    """Renumber the output or the input channels of a matrix, which is in the model or about to be stored."""
    name, module = linear.name, cast(Any, linear.module)
    bias = _tensors(name, by_name).get("bias", module.bias)
    if name not in by_name:
        linear.weight.copy_(linear.weight[order] if outputs else linear.weight[:, order])
        if outputs and bias is not None:
            bias.copy_(bias[order])
        return
    old = by_name[name]
    columns, rows = _sides(old.spec["form"])
    side = str(rows if outputs else columns)
    tensors = old.tensors | {side: old.tensors[side][order] if outputs else old.tensors[side][:, order]}
    if outputs and bias is not None:
        tensors["bias"] = bias[order]
    by_name[name] = replace(old, tensors=tensors, origin=old.origin and old.origin.renumbered(order, outputs))
