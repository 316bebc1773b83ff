"""Compression: the ranks of an allocation and the vectors of a spectrum, put into a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from drank.method.pivot import pivot_rows, split_group
from drank.method.spectrum import factors
from drank.method.threads import side_by_side
from drank.model.folding import Stored, Tensors, fold_channel_order
from drank.model.layers import places
from drank.model.linears import is_conv1d
from drank.model.quantizer import attach

# Coefficients of the pivot form are stored in bfloat16; pivoting keeps them below 10. One of this size
# would mean rows that nearly repeat each other, whose rounding errors it multiplies.
LARGEST_COEFFICIENT = 64.0


class UnsafePivotError(ValueError):
    """A unit's rows are too nearly dependent to be stored in pivot form; the message says what to do instead."""


@runtime_checkable
class Factors(Protocol):
    """The store of the step ``spectrum``: ``cuts/<MLP>.<channels>``, and the first rows of ``factors/<file>``."""

    def __getitem__(self, name: str, /) -> Tensors: ...
    def rows(self, name: str, n_rows: int, /) -> Tensors: ...


@torch.no_grad()
def compress(model: Any, units: Sequence[Mapping[str, Any]], spectrum: Factors, provenance: Mapping[str, Any]) -> Any:
    """Replace the modules of compressed units by smaller ones, in place, and make the model saveable.

    Args:
        units: rows of an allocation: name, members, factors, role, form, rank, out_features, in_features.
        provenance: goes to config.json under ``quantization_config.provenance``.

    A model with nothing to replace (the dense variant) is returned as it is, a plain one.

    Raises:
        UnsafePivotError: see :data:`LARGEST_COEFFICIENT`.
    """
    width = max((max(unit["out_features"], unit["in_features"]) for unit in units), default=0)
    of_units = side_by_side(lambda unit: list(_stored(model, unit, spectrum)), units, width)
    stored = [module for modules in of_units for module in modules]
    if not stored:
        return model
    stored = fold_channel_order(model, stored)
    attach(model, {module.name: module.spec for module in stored}, provenance)
    for module in stored:
        target = model.get_submodule(module.name)
        stored_in = target.state_dict()
        for name, tensor in module.tensors.items():
            stored_in[name].copy_(tensor.T if name == "weight" and is_conv1d(target) else tensor)
    return model


def _stored(model: nn.Module, unit: Mapping[str, Any], spectrum: Factors) -> Iterator[Stored]:
    members, form = unit["members"], unit["form"]
    modules = [model.get_submodule(name) for name in members]
    sizes = {"out_features": unit["out_features"] // len(members), "in_features": unit["in_features"]}
    removed = _removed_channels(modules[0], unit, spectrum)
    if form == "dense":
        if removed:
            yield Stored(members[0], {"form": form, **sizes}, removed)
        return
    weight = removed["weight"] if removed else torch.cat([_weight(module) for module in modules])
    left, right = factors(weight, **spectrum.rows(f"factors/{unit['factors']}", unit["rank"]))
    spec = {"form": form, "rank": unit["rank"], **sizes}
    bias = {key: tensor for key, tensor in removed.items() if key == "bias"}
    for name, (shared, tensors) in zip(members, LAYOUTS[form](left, right, members), strict=True):
        yield Stored(name, spec | shared, tensors | bias)


Laid = Iterator[tuple[dict[str, Any], Tensors]]  # per member: additions to the sizes in its spec, and its tensors


def _factors(left: Tensor, right: Tensor, members: Sequence[str]) -> Laid:
    """weight (out, k) and basis (k, in), which the members of a group share."""
    for rows in left.chunk(len(members)):
        yield {"basis": members[0]} if len(members) > 1 else {}, {"weight": rows, "basis": right}


def _pivot(left: Tensor, right: Tensor, members: Sequence[str]) -> Laid:
    """k rows kept, coefficients (out - k, k) of the others, and the places of all; see ``method.pivot``."""
    if not left.any():
        left = torch.eye(*left.shape, dtype=left.dtype)  # a matrix of zeros: one row is as good as another
    pivot = pivot_rows(left, right)
    if pivot.max_abs_coefficient > LARGEST_COEFFICIENT:
        raise UnsafePivotError(
            f"{members[0]}: pivot coefficients reach {pivot.max_abs_coefficient:.3g}, above {LARGEST_COEFFICIENT:g}, "
            f"and bfloat16 would lose the layer; use storage 'factors', or list it under covariance.ignore"
        )
    if len(members) == 1:
        yield {}, {"weight": pivot.kept, "coefficients": pivot.coefficients, "places": places(pivot.order)}
        return
    out = len(left) // len(members)
    for part in split_group(pivot, [out] * len(members)):
        shared = {"basis": members[0], "first": part.first, "kept": out - len(part.coefficients)}
        yield shared, {"basis.weight": pivot.kept, "weight": part.coefficients, "places": places(part.order)}


# By the names of allocation.units.PRICES.
LAYOUTS: dict[str, Callable[[Tensor, Tensor, Sequence[str]], Laid]] = {"factors": _factors, "pivot": _pivot}


def _removed_channels(module: Any, unit: Mapping[str, Any], spectrum: Factors) -> Tensors:
    """Weight, and bias if any, of an MLP's matrix after the removal of channels; nothing where none was removed."""
    weight = _weight(module)
    if weight.shape == (unit["out_features"], unit["in_features"]) or len(unit["members"]) > 1:
        return {}
    down = unit["role"] == "down"
    cut = spectrum[f"cuts/{unit['name'].rpartition('.')[0]}.{unit['in_features' if down else 'out_features']}"]
    tensors = {"weight": cut["down"] if down else weight[cut["alive"]]}
    if module.bias is not None and not down:
        tensors["bias"] = module.bias[cut["alive"]]
    return tensors


def _weight(module: Any) -> Tensor:
    """(out, in); transformers' Conv1D stores the transpose."""
    return module.weight.T if is_conv1d(module) else module.weight
