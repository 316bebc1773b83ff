"""The forms of storage: keys of a module in config.json, and the tensors that follow from them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from drank.method.precisions import Grid
from drank.model.format import FormatError, Spec
from drank.model.layers import FORMS, LowRankLinear, RoundedLinear, embedding_shapes
from drank.model.packing import Shapes, packed_shapes


def class_of(spec: Spec) -> type[LowRankLinear]:
    """The class of a linear of any form but dense and not rounded."""
    kind = RoundedLinear if spec.form == "dense" else FORMS[spec.form]
    return kind if spec.basis is None or kind.shared is None else kind.shared


def keys_of(spec: Spec) -> dict[str, Any]:
    """Arguments of the class of a spec beside sizes, rank and basis; None where the spec lacks them."""
    return {key: getattr(spec, key, None) for key in class_of(spec).keys}


def grid_of(spec: Spec) -> Grid | None:
    """The grid of the matrices of a linear; None where they are not rounded."""
    return Grid(spec.bits, spec.group) if spec.bits and spec.group else None


def stored_shapes(specs: Mapping[str, Spec]) -> Shapes:
    """Name and shape of every tensor but biases that modules of these specs are stored in; a shared basis once.

    Raises:
        FormatError: those of :func:`check_specs`.
    """
    check_specs(specs)
    shapes: Shapes = {}
    for name, key, shape in _matrices(specs):
        grid = grid_of(specs[name])
        if specs[name].form == "embedding":
            shapes |= {f"{name}.{own}": size for own, size in embedding_shapes(*shape).items()}
        elif grid is None or key == "places":
            shapes[f"{name}.{key}"] = shape
        else:
            shapes |= packed_shapes(f"{name}.{key}", shape, grid)
    return shapes


def numbers_in_integers(specs: Mapping[str, Spec]) -> int:
    """Numbers of a model that are stored as integers, a shared basis and a tied head counted once.

    Raises:
        FormatError: those of :func:`check_specs`.
    """
    rounded = {name: spec for name, spec in specs.items() if spec.bits}
    check_specs(rounded)
    return sum(math.prod(shape) for _, key, shape in _matrices(rounded) if key != "places")


def _matrices(specs: Mapping[str, Spec]) -> Iterator[tuple[str, str, Any]]:
    """Module, name and shape of every matrix, rounded or not, and of places; a shared basis once."""
    for name, spec in specs.items():
        if spec.form in ("dense", "embedding"):
            yield name, "weight", (spec.out_features, spec.in_features)
            continue
        kind = class_of(spec)
        for key, shape in kind.shapes(spec.in_features, spec.out_features, spec.rank or 0, **keys_of(spec)).items():
            if spec.basis in (None, name) or key != kind.basis_name:
                yield name, key, shape


def check_specs(specs: Mapping[str, Spec]) -> None:
    """Refuse specs that their forms do not allow.

    Raises:
        FormatError: an unknown form, a key or rank that the form has not, or a basis whose owner has none to share.
    """
    for name, spec in specs.items():
        _check_spec(name, spec, specs)
    _check_own_rows(specs)


def _check_spec(name: str, spec: Spec, specs: Mapping[str, Spec]) -> None:
    """Refuse a spec that its form does not allow, and a basis whose owner has none to share."""

    def refuse(key: str, rule: str) -> NoReturn:
        raise FormatError(f"{name}: {key} is {repr(getattr(spec, key, None))[:200]}; {rule}")

    if spec.form not in ("dense", "embedding", *FORMS):
        refuse("form", f"known are dense, embedding, {', '.join(FORMS)}")
    if spec.form == "embedding" and spec.bits != 8:
        refuse("bits", "form 'embedding' has 8")
    if (spec.group is None) != (spec.bits is None or spec.form == "embedding"):
        refuse("group", "it goes with bits, in every form but 'embedding'")
    kind = None if spec.form in ("dense", "embedding") else class_of(spec)
    if spec.basis is not None and (kind is None or kind.basis_name is None):
        refuse("basis", f"form {spec.form!r} shares none")
    if spec.in_order and (kind is None or "in_order" not in kind.keys):
        refuse("in_order", "only 'pivot' without a shared basis may be in order")
    if kind is None:
        return
    for key, value in keys_of(spec).items():
        if value is None:
            refuse(key, f"form {spec.form!r} needs it here")
    most = kind.largest_rank(spec.in_features, spec.out_features)
    if spec.rank is None or spec.rank > most:
        sizes = f"{spec.out_features} x {spec.in_features}"
        refuse("rank", f"it must be an integer of at most {most} for {sizes} in form {spec.form!r}, or form 'dense'")
    if spec.kept is not None and spec.kept > spec.out_features:
        refuse("kept", f"it must be at most the module's out_features, {spec.out_features}")
    if spec.basis in (None, name):
        return
    owner = specs.get(spec.basis)
    if owner is None:
        refuse("basis", "the owner of a basis must be among the compressed modules")
    if owner.form != spec.form or class_of(owner) is not kind or owner.basis not in (None, spec.basis):
        refuse("basis", f"that module has no basis of its own to share in form {spec.form!r}")
    for one, other in (("rank", "in_features"), ("bits", "group")):
        there = getattr(owner, one), getattr(owner, other)
        if there != (getattr(spec, one), getattr(spec, other)):
            refuse("basis", f"{one} and {other} there are {there[0]} and {there[1]}; they must be the same")


def _check_own_rows(specs: Mapping[str, Spec]) -> None:
    """Refuse a group whose modules do not keep each row of their basis exactly once."""
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for name, spec in specs.items():
        if spec.form != "dense" and spec.basis is not None and "kept" in class_of(spec).keys:
            groups.setdefault(spec.basis, []).append((spec.first or 0, spec.kept or 0, name))
    for owner, group in groups.items():
        rank, end = specs[owner].rank, 0
        for first, kept, name in sorted(group):
            if first != end:
                raise FormatError(
                    f"{name}: first is {first}, but the kept rows before it of the basis of {owner} end at {end}: each "
                    f"of the {rank} rows must be kept by exactly one module"
                )
            end += kept
        if end != rank:
            raise FormatError(
                f"{owner}: the modules that share its basis keep {end} rows of {rank}; each must be kept by exactly "
                "one module: is one of them missing?"
            )
