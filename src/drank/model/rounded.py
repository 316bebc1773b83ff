"""Modules rounded to few bits: the order of their matrices, the metric of each, and what later ones make up for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drank.method.precisions import GROUP, Grid
from drank.method.rounding import Rounded, feedback, nearest, refit
from drank.method.threads import side_by_side
from drank.model.folding import Origin, Stored, Tensors
from drank.model.format import SCALES, ZEROS
from drank.model.layers import FORMS
from drank.model.packing import pack

ROWS_AT_ONCE = 4096  # of an embedding, whose every row is rounded by itself


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded.

    Attributes:
        group: neighbours in a row that share a scale and a zero point.
        inputs: name of a linear -> the covariance of its inputs, for error feedback; None rounds to nearest.
        gradients: name of a linear -> the covariance of its output gradients; None is the identity.
    """

    group: int = GROUP
    inputs: Callable[[str], Tensor] | None = None
    gradients: Callable[[str], Tensor] | None = None


def rounded(modules: Sequence[Stored], rounding: Rounding) -> list[Stored]:
    """The modules of a unit, the matrices of those that have an origin as integers.

    Raises:
        ValueError: error feedback is asked of a form that it is not defined for.
    """
    if modules[0].origin is None:
        return list(modules)
    matrices = _to_nearest(modules) if rounding.inputs is None else _with_feedback(modules, rounding)
    bits = modules[0].spec["bits"]
    return [
        replace(module, tensors=_others(module) | _integers(found, bits), origin=None)
        for module, found in zip(modules, matrices, strict=True)
    ]


def _integers(found: dict[str, Rounded], bits: int) -> Tensors:
    """The tensors of these matrices; see ``model.packing``."""
    tensors = {}
    for name, matrix in found.items():
        tensors[name] = pack(matrix.codes, bits)[..., None]
        tensors |= {f"{name}{SCALES}": matrix.scales, f"{name}{ZEROS}": pack(matrix.zeros, bits)}
    return tensors


def _others(module: Stored) -> Tensors:
    """Bias and places."""
    return {name: tensor for name, tensor in module.tensors.items() if tensor.ndim == 1}


def _to_nearest(modules: Sequence[Stored]) -> list[dict[str, Rounded]]:
    grid = _grid(modules[0])
    return [{name: nearest(t, grid) for name, t in module.tensors.items() if t.ndim == 2} for module in modules]


def _with_feedback(modules: Sequence[Stored], rounding: Rounding) -> list[dict[str, Rounded]]:
    """A whole matrix W in the metric of both sides; of rows of K and C K, first K in that of the inputs, H, then C,
    fitted again to what K has become, in K H Kᵀ and the gradients of its rows."""
    H = torch.stack([_inputs(module, rounding) for module in modules]).mean(0)
    grid, spec = _grid(modules[0]), modules[0].spec
    if spec["form"] == "dense":
        return [{"weight": feedback(m.tensors["weight"], grid, H, _gradients(m, rounding))} for m in modules]
    kind = FORMS[spec["form"]]
    kind = kind.shared if kind.shared and "basis" in spec else kind
    if kind.spanning is None or kind.combining is None:
        raise ValueError(f"form {spec['form']!r} knows no error feedback; set rounding to 'nearest'")
    K = feedback(modules[0].tensors[kind.spanning], grid, H)
    rows = K.weight
    through = rows.double() @ H.double() @ rows.double().T
    found = []
    for module in modules:
        W, order, G = _origin(module).weight, _order(module), _gradients(module, rounding)
        G = None if G is None else G[order][:, order]
        n, first = len(W) - len(module.tensors[kind.combining]), module.spec.get("first", 0)
        C = refit(W.float()[order], rows, H, G, rows[first : first + n]).float()
        combined = feedback(C, grid, through, None if G is None else G[n:, n:]) if len(C) else nearest(C, grid)
        found.append({kind.spanning: K, kind.combining: combined})
    return found


def _grid(module: Stored) -> Grid:
    return Grid(module.spec["bits"], module.spec["group"])


def _origin(module: Stored) -> Origin:
    assert module.origin is not None, "a module to be rounded says what it comes from"
    return module.origin


def _inputs(module: Stored, rounding: Rounding) -> Tensor:
    assert rounding.inputs is not None, "feedback goes by the inputs"
    features = _origin(module).inputs
    return rounding.inputs(module.name)[features[:, None], features]


def _gradients(module: Stored, rounding: Rounding) -> Tensor | None:
    if rounding.gradients is None:
        return None
    features = _origin(module).outputs
    return rounding.gradients(module.name)[features[:, None], features]


def _order(module: Stored) -> Tensor:
    """Output features in the order in which the form computes them."""
    places = module.tensors.get("places")
    return torch.arange(len(_origin(module).weight)) if places is None else places.long().argsort()


def rounded_embeddings(model: Any) -> list[Stored]:
    """The input embedding in 8 bits, and the output head: with it where it is tied, else as a matrix of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    of_its_own = [] if head is None or head.weight is embedding.weight else [head]
    names = {module: name for name, module in model.named_modules()}
    return [_rounded_embedding(names[table], table.weight.detach()) for table in (embedding, *of_its_own)]


def _rounded_embedding(name: str, weight: Tensor) -> Stored:
    grid = Grid(8, weight.shape[1], symmetric=True)
    parts = list(side_by_side(lambda rows: nearest(rows, grid), weight.split(ROWS_AT_ONCE), weight.shape[1]))
    codes = torch.cat([part.codes for part in parts]) ^ 128  # the middle of the grid is 0
    spec = {"form": "embedding", "out_features": len(weight), "in_features": weight.shape[1], "bits": 8}
    scales = torch.cat([part.scales for part in parts])
    return Stored(name, spec, {"weight": codes.view(torch.int8)[..., None], f"weight{SCALES}": scales})
