"""Compression: the ranks of an allocation and the vectors of a spectrum, put into a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from drank.method.metrics import METRICS
from drank.method.pivot import pivot_rows, split_group
from drank.method.precisions import FULL
from drank.method.spectrum import factors
from drank.method.threads import side_by_side
from drank.model.experts import expert_of, unfuse
from drank.model.folding import Origin, Stored, Tensors, fold_channel_order
from drank.model.layers import places
from drank.model.linears import PARTS, is_conv1d
from drank.model.quantizer import attach
from drank.model.rounded import Rounding, rounded, rounded_embeddings

# Coefficients of the pivot form are stored in bfloat16; pivoting keeps them below 10. One of this size
# would mean rows that nearly repeat each other, whose rounding errors it multiplies.
LARGEST_COEFFICIENT = 64.0
NEAREST = Rounding()


class UnsafePivotError(ValueError):
    """A unit's rows are too nearly dependent to be stored in pivot form; the message says what to do instead."""


@runtime_checkable
class Factors(Protocol):
    """The store of the step ``spectrum``: ``cuts/<MLP>.<channels>``, and the first rows of ``factors/<file>``."""

    def __getitem__(self, name: str, /) -> Tensors: ...
    def rows(self, name: str, n_rows: int, /) -> Tensors: ...


def compressed(
    model: Any,
    allocation: Mapping[str, Any],
    metric: str,
    provenance: Mapping[str, Any],
    spectrum: Factors,
    covariances: Mapping[str, Mapping[str, Tensor]],
    described: Callable[[], Mapping[str, Any]],
) -> Any:
    """:func:`compress` as an allocation of a spectrum in ``metric`` has it, rounded as :func:`rounding_of` says."""
    rounding = rounding_of(allocation, metric, covariances, described)
    embedding_bits = allocation.get("embedding_bits", FULL)
    return compress(model, allocation["units"], spectrum, provenance, rounding, embedding_bits)


@torch.no_grad()
def compress(
    model: Any,
    units: Sequence[Mapping[str, Any]],
    spectrum: Factors,
    provenance: Mapping[str, Any],
    rounding: Rounding = NEAREST,
    embedding_bits: int = FULL,
) -> Any:
    """Replace the modules of compressed units by smaller ones, in place, and make the model saveable.

    Args:
        units: rows of an allocation: name, members, factors, role, form, rank, out_features, in_features, and bits
            where numbers are rounded.
        provenance: goes to config.json under ``quantization_config.provenance``.
        rounding: how numbers are rounded.
        embedding_bits: 8 or 16, of the input embedding and the output head.

    A model with nothing to replace (the dense variant) is returned as it is, a plain one.

    Raises:
        UnsafePivotError: see :data:`LARGEST_COEFFICIENT`.
    """
    unfuse(model, [name for unit in units for name in unit["members"]])
    width = max((max(unit["out_features"], unit["in_features"]) for unit in units), default=0)
    of_units = side_by_side(lambda unit: list(_stored(model, unit, spectrum, rounding.group)), units, width)
    stored = [module for modules in of_units for module in modules]
    # Before rounding, so that columns that share a scale stay neighbours.
    stored = fold_channel_order(model, stored) if stored else []
    groups = [list(group) for _, group in groupby(stored, lambda module: module.spec.get("basis", module.name))]
    of_groups = side_by_side(lambda group: rounded(group, rounding), groups, width)
    stored = [module for modules in of_groups for module in modules]
    stored += rounded_embeddings(model) if embedding_bits < FULL else []
    if not stored:
        return model
    attach(model, {module.name: module.spec for module in stored}, provenance)
    for module in stored:
        target = model.get_submodule(module.name)
        stored_in = target.state_dict()
        for name, tensor in module.tensors.items():
            stored_in[name].copy_(tensor.T if name == "weight" and is_conv1d(target) else tensor)
    return model


def rounding_of(
    allocation: Mapping[str, Any],
    metric: str,
    covariances: Mapping[str, Mapping[str, Tensor]],
    described: Callable[[], Mapping[str, Any]],
) -> Rounding:
    """How an allocation wants its matrices rounded.

    Args:
        metric: that of its spectrum; output gradients count if they do there.
        covariances: the tensors that the step ``covariance`` stored; ``described`` reads its summary, which tells for
            every linear the one under whose name its input is stored.
    """
    if "precision" not in allocation:
        return NEAREST
    group = allocation["group_size"]
    if allocation["rounding"] == "nearest":
        return Rounding(group)

    def read(name: str) -> Tensor:
        return covariances[name]["covariance"]

    owners = described()["owners"]
    gradients = (lambda name: read(f"gradients/{name}")) if METRICS[metric].gradients else None
    return Rounding(group, lambda name: read(f"inputs/{owners[name]}"), gradients)


def _stored(model: nn.Module, unit: Mapping[str, Any], spectrum: Factors, group: int) -> Iterator[Stored]:
    members, form, bits = unit["members"], unit["form"], unit.get("bits", FULL)
    modules = [model.get_submodule(name) for name in members]
    sizes = {"out_features": unit["out_features"] // len(members), "in_features": unit["in_features"]}
    removed, alive = _removed_channels(modules[0], unit, spectrum)
    weights = [removed["weight"]] if removed else [_weight(module) for module in modules]
    origins: list[Origin | None] = [None for _ in members]
    if bits < FULL:
        sizes |= {"bits": bits, "group": group}
        channels = {"inputs" if unit["role"] == "down" else "outputs": alive} if removed else {}
        origins = [_origin(weight, **channels) for weight in weights]
    if form == "dense":
        for name, weight, origin in zip(members, weights, origins, strict=True):
            # One that is dense is told too: by the names in config.json the loader knows which experts are linears.
            if removed or origin or expert_of(model, name):
                yield Stored(name, {"form": form, **sizes}, removed or {"weight": weight}, origin)
        return
    left, right = factors(torch.cat(weights), **spectrum.rows(f"factors/{unit['factors']}", unit["rank"]))
    spec = {"form": form, "rank": unit["rank"], **sizes}
    bias = {key: tensor for key, tensor in removed.items() if key == "bias"}
    laid = LAYOUTS[form](left, right, members)
    for name, origin, (shared, tensors) in zip(members, origins, laid, strict=True):
        yield Stored(name, spec | shared, tensors | bias, origin)


def _origin(weight: Tensor, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Origin:
    n_out, n_in = weight.shape
    outputs = torch.arange(n_out) if outputs is None else outputs
    return Origin(weight, outputs, torch.arange(n_in) if inputs is None else inputs)


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


def _removed_channels(module: Any, unit: Mapping[str, Any], spectrum: Factors) -> tuple[Tensors, Tensor | None]:
    """Weight, and bias if any, of an MLP's matrix after the removal of channels, and the numbers of its rows that are
    kept, or of the columns of down; nothing where none was removed."""
    weight = _weight(module)
    if weight.shape == (unit["out_features"], unit["in_features"]) or len(unit["members"]) > 1:
        return {}, None
    mlp, down, parts = unit["name"].rpartition(".")[0], unit["role"] == "down", PARTS.get(unit["role"], 1)
    cut = spectrum[f"cuts/{mlp}.{unit['in_features'] if down else unit['out_features'] // parts}"]
    if down:
        return {"weight": cut["down"]}, cut["alive"]
    rows = torch.cat([cut["alive"] + start for start in range(0, len(weight), len(weight) // parts)])
    tensors = {"weight": weight[rows]}
    if module.bias is not None:
        tensors["bias"] = module.bias[rows]
    return tensors, rows


def _weight(module: Any) -> Tensor:
    """(out, in); transformers' Conv1D stores the transpose."""
    return module.weight.T if is_conv1d(module) else module.weight
