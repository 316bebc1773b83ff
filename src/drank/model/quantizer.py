"""The compressed model as a plain Hugging Face folder: transformers' quantizer `drank`.

``config.json`` of a compressed folder says, under ``quantization_config``::

    {"quant_method": "drank", "format_version": 2, "modules": {dotted name: spec}, "provenance": {...}}
    spec: {"form": "factors" | "pivot" | "dense", "rank": r, "out_features": n, "in_features": n,
           "basis": name, "first": n, "kept": n, "in_order": true}

`out_features` and `in_features` are the sizes in the compressed model, at most those of the architecture:
removed MLP channels make them smaller. `rank` is absent for dense. `basis` names the module whose basis this one
shares, its owner: of the same form, rank and in_features, and with a basis of its own (it may name itself). Tensors:
see modules.py; a shared basis is stored once, under its owner. Keys that this version does not know, of the whole or
of a spec, are kept when the model is saved again.

`first` and `kept` go with `basis` in form `pivot`, where the owner does name itself: rows first ... first + kept - 1
of the basis are the module's own output features, and each row of a basis is so of exactly one module. `kept` may be
0. A `pivot` module without `basis` has its own rows, all of them kept, and neither key; with `in_order` its output
features are numbered as it computes them, and it has no `places`.

Importing this module registers the format; ``import drank`` arranges for that once transformers is there.
Without it ``from_pretrained`` stops with mismatched shapes, because every compressed module has a `weight` of
another shape than the dense one: rank < in_features (factors, and pivot with a shared basis) and rank <
out_features (pivot without) see to that, for Conv1D's transposed weight too.
"""

import copy
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

# The submodules and not the package: this module is also imported half-way through transformers.quantizers.
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from drank import __version__
from drank.model.checksums import check_released
from drank.model.layers import FactorLinear, PivotLinear, SharedPivotLinear
from drank.model.linears import role_of

METHOD = "drank"
FORMAT_VERSION = 2
FORMS = ("factors", "pivot", "dense")
# Keys that transformers looks for in any quantization_config, and would do to ours.
NOT_OURS = ("dequantize", "load_in_4bit", "load_in_8bit")

Model = TypeVar("Model", bound=nn.Module)


class FormatError(ValueError):
    """A quantization_config that is malformed, too new, or unfit for the model; the message names it."""


@dataclass(frozen=True)
class Spec:
    """One module of the format, checked in itself.

    Attributes:
        basis: the owner of the module's basis, None where that is the module itself.
        own_rows: (first, kept), None but in form pivot with a shared basis.
        in_order: whether there are no `places`; in form pivot without a shared basis.
    """

    form: Literal["factors", "pivot", "dense"]
    out_features: int
    in_features: int
    rank: int
    basis: str | None = None
    own_rows: tuple[int, int] | None = None
    in_order: bool = False


def swap_modules(model: Model, specs: Mapping[str, Mapping[str, Any]]) -> Model:
    """Replace the modules named in specs by the forms they are stored in, in place.

    New modules have dtype and device of the old ones. Their bias is the old one where the output size is
    unchanged; everything else is uninitialised, to be loaded or filled (in form pivot, places is the identity).
    `dense` with unchanged sizes leaves the module alone. Modules that share a basis have one Parameter, which
    save_pretrained and from_pretrained are told of. An error leaves the model as it was.

    Raises:
        FormatError: a malformed spec, or one that does not fit the model.
    """
    checked = _parse_specs(specs)
    names = _names_in(model, checked)
    parsed = {names[name]: spec for name, spec in checked.items()}
    for name, spec in parsed.items():
        _check_fit(model, name, spec)
    for name, spec in parsed.items():
        model.set_submodule(name, _replacement(model.get_submodule(name), spec))
    _share_bases(model, {name: _name_in(model, spec.basis) for name, spec in parsed.items() if spec.basis})
    return model


def attach(model: Model, specs: Mapping[str, Mapping[str, Any]], provenance: Mapping[str, Any]) -> Model:
    """Make an in-memory model, whose modules were swapped and filled, saveable by plain save_pretrained.

    Args:
        specs: those given to swap_modules.
        provenance: what made this model; JSON values, kept in config.json as they are.

    Raises:
        FormatError: a module is not what its spec says.
    """
    for name, spec in _parse_specs(specs).items():
        _check_swapped(model.get_submodule(_name_in(model, name)), name, spec)
    quantizer = DrankQuantizer(DrankConfig(modules=specs, provenance=provenance), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD  # type: ignore[assignment]
    model._weight_conversions = []  # type: ignore[assignment]  # what save_pretrained goes by
    return quantizer.postprocess_model(model)


class DrankConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed folder, given as its keys, whose values may be anything JSON can hold.

    Raises:
        FormatError: a format_version that this version of drank does not read, a key whose value is no mapping where
            it must be one, a key that transformers would take for its own, or a malformed spec.
    """

    def __init__(
        self,
        modules: Any = None,
        format_version: Any = FORMAT_VERSION,
        provenance: Any = None,
        **unknown: Any,
    ) -> None:
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            older = type(format_version) is int and 0 < format_version < FORMAT_VERSION
            remedy = (
                "build the folder again with 'dvc repro'" if older else "upgrade with 'pip install --upgrade drank'"
            )
            raise FormatError(
                f"quantization_config.format_version is {_shown(format_version)}; drank {__version__} reads "
                f"{FORMAT_VERSION}: {remedy}"
            )
        for key, value in (("modules", modules), ("provenance", provenance)):
            if not isinstance(value, Mapping | None):
                raise FormatError(f"quantization_config.{key} is {_shown(value)}; it must be a mapping")
        for key, value in unknown.items():
            if key in NOT_OURS or hasattr(type(self), key):
                raise FormatError(
                    f"quantization_config.{key} is {_shown(value)}; transformers has a meaning of its own for this "
                    "name, and drank none: remove it"
                )
        _parse_specs(modules or {})
        self.__dict__.update(unknown)
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = {name: dict(spec) for name, spec in (modules or {}).items()}
        self.provenance = dict(provenance or {})


class DrankQuantizer(HfQuantizer):
    """Builds the compressed modules before their weights are loaded, and turns them back into dense ones."""

    # Refuses from_pretrained(dense folder, quantization_config=DrankConfig(...)): loading is not compressing.
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        check_released(map(Path, checkpoint_files or []))
        specs = self.quantization_config.modules
        swap_modules(model, specs)
        _check_stored(model, [_name_in(model, name) for name in specs], checkpoint_files or [])

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Plain modules of the architecture's sizes; exact up to rounding to the dtype of the model.

        Removed channels come back as zeros at the end: an MLP is a sum over its channels in any order, so zero
        ones add nothing. `dtype` is ignored: transformers passes the config's, which may differ from the
        weights' own.
        """
        with torch.device("meta"):
            original = type(model)(copy.deepcopy(model.config))
        names = [_name_in(model, name) for name in self.quantization_config.modules]
        bases = {_basis_key(model, name) for name in names}
        for name in names:
            model.set_submodule(name, _dense(name, model.get_submodule(name), original.get_submodule(name)))
        del model._weight_conversions  # a plain model again, which transformers saves in its own way
        model.all_tied_weights_keys = _without(model.all_tied_weights_keys, bases)
        model._tied_weights_keys = _without(model._tied_weights_keys or {}, {_exactly(key) for key in bases})
        return model

    def update_weight_conversions(self, *_: Any) -> list[Any]:
        """None: a compressed folder has its tensors under the names of their modules, which config.json speaks of.
        For some architectures transformers reads and writes the names of older checkpoints otherwise."""
        return []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Lets transformers.Trainer fine-tune the factors."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register(_transformers: ModuleType | None = None) -> None:
    """Make transformers know the format; more than once does no harm."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(DrankConfig)
        register_quantizer(METHOD)(DrankQuantizer)


def _parse_specs(specs: Mapping[Any, Any]) -> dict[str, Spec]:
    parsed = {name: _parse(name, spec) for name, spec in specs.items()}
    for name, spec in parsed.items():
        if spec.basis is not None:
            _check_basis(name, spec, parsed.get(spec.basis))
    _check_own_rows(parsed)
    return parsed


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _parse(name: Any, spec: Any) -> Spec:
    if not isinstance(name, str) or not name:
        raise FormatError(f"quantization_config.modules has the key {_shown(name)}; it must be the name of a module")
    if not isinstance(spec, Mapping):
        raise FormatError(
            f"{name}: its spec is {_shown(spec)}; it must be a mapping with form, out_features, in_features"
        )
    form = spec.get("form")
    if form not in FORMS:
        raise FormatError(f"{name}: form is {_shown(form)}; known are {', '.join(FORMS)}")
    n_out, n_in = _integer(name, spec, "out_features", 1), _integer(name, spec, "in_features", 1)
    basis = spec.get("basis")
    if not isinstance(basis, str | None):
        raise FormatError(f"{name}: basis is {_shown(basis)}; it must be the name of a module")
    if form == "dense":
        if basis is not None:
            raise FormatError(f"{name}: basis is {basis!r}; only 'factors' and 'pivot' share one, not {form!r}")
        return Spec(form, n_out, n_in, min(n_out, n_in))
    unshared_pivot = form == "pivot" and basis is None
    rank, most = _integer(name, spec, "rank", 1), min(n_in, n_out - 1) if unshared_pivot else n_in - 1
    if rank > most:
        raise FormatError(
            f"{name}: rank {rank} is more than {most}, the largest for {n_out} x {n_in} in form {form!r}; "
            "store it as 'dense'"
        )
    own_rows = _own_rows(name, spec, n_out) if form == "pivot" and basis is not None else None
    in_order = spec.get("in_order", False)
    if type(in_order) is not bool or (in_order and not unshared_pivot):
        raise FormatError(
            f"{name}: in_order is {_shown(in_order)}; it is true or false, and for 'pivot' without a shared basis"
        )
    return Spec(form, n_out, n_in, rank, None if basis == name else basis, own_rows, in_order)


def _own_rows(name: str, spec: Mapping[str, Any], n_out: int) -> tuple[int, int]:
    first, kept = _integer(name, spec, "first", 0), _integer(name, spec, "kept", 0)
    if kept > n_out:
        raise FormatError(f"{name}: kept is {kept}; it must be at most its out_features, {n_out}")
    return first, kept


def _integer(name: str, spec: Mapping[str, Any], key: str, least: int) -> int:
    value = spec.get(key)
    if type(value) is not int or value < least:
        raise FormatError(f"{name}: {key} is {_shown(value)}; it must be an integer of at least {least}")
    return value


def _check_basis(name: str, spec: Spec, owner: Spec | None) -> None:
    if owner is None:
        raise FormatError(f"{name}: the owner of its basis, {spec.basis}, is not among the compressed modules")
    if owner.form != spec.form or owner.basis is not None or (owner.own_rows is None) != (spec.own_rows is None):
        raise FormatError(f"{name}: {spec.basis} has no basis of its own to share in form {spec.form!r}")
    if (owner.rank, owner.in_features) != (spec.rank, spec.in_features):
        raise FormatError(
            f"{name}: rank {spec.rank} and in_features {spec.in_features} differ from those of the "
            f"owner of its basis, {spec.basis}: {owner.rank} and {owner.in_features}"
        )


def _check_own_rows(specs: Mapping[str, Spec]) -> None:
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for name, spec in specs.items():
        if spec.own_rows is not None:
            groups.setdefault(spec.basis or name, []).append((*spec.own_rows, name))
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


def _name_in(model: nn.Module, name: str) -> str:
    """The module's name in this model: specs written for a model with a head also fit the bare decoder, and
    vice versa."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise FormatError(f"{name} is not in this {type(model).__name__}: is config.json that of another model?")


def _names_in(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        if (inside := _name_in(model, name)) in found.values():
            raise FormatError(f"{name}: another key of quantization_config.modules is also {inside}; remove one")
        found[name] = inside
    return found


def _check_fit(model: nn.Module, name: str, spec: Spec) -> None:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | Conv1D):
        raise FormatError(f"{name} is {type(module).__name__}; only nn.Linear and Conv1D can be compressed")
    ties = getattr(model, "all_tied_weights_keys", {})
    if f"{name}.weight" in {*ties.keys(), *ties.values()}:
        raise FormatError(f"{name}: its weight is also that of another module (tied), so it cannot be compressed alone")
    n_out, n_in = _sizes(module)
    if spec.out_features > n_out or spec.in_features > n_in:
        raise FormatError(
            f"{name}: {spec.out_features} x {spec.in_features} (out x in) is larger than the architecture's "
            f"{n_out} x {n_in}"
        )


def _check_swapped(module: Any, name: str, spec: Spec) -> None:
    pivot = PivotLinear if spec.own_rows is None else SharedPivotLinear
    expected = {"factors": FactorLinear, "pivot": pivot, "dense": nn.Linear | Conv1D}[spec.form]
    sizes = (spec.out_features, spec.in_features)
    fits = isinstance(module, expected) and _sizes(module) == sizes
    fits = fits and (spec.form == "dense" or module.rank == spec.rank)
    fits = fits and (spec.own_rows is None or (module.first, module.kept) == spec.own_rows)
    fits = fits and getattr(module, "in_order", False) == spec.in_order
    if not fits:
        shown, rows = " ".join(str(module).split()), spec.own_rows
        shared = "" if rows is None else f" with first {rows[0]} and kept {rows[1]}"
        raise FormatError(
            f"{name} is {shown}, not {spec.form!r} of rank {spec.rank}, {sizes[0]} x {sizes[1]} (out x in){shared}: "
            "call swap_modules with the same specs first"
        )


def _sizes(module: Any) -> tuple[int, int]:
    """(out, in) of a linear of any form."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _replacement(old: Any, spec: Spec) -> nn.Module:
    if spec.form == "dense" and (spec.out_features, spec.in_features) == _sizes(old):
        return old
    new = _empty(old, spec)
    if old.bias is not None and spec.out_features == _sizes(old)[0]:
        new.bias = old.bias
    return new


def _empty(old: Any, spec: Spec) -> nn.Module:
    sizes, bias = (spec.in_features, spec.out_features), old.bias is not None
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    if spec.form == "factors":
        return FactorLinear(*sizes, spec.rank, bias, **place)
    if spec.own_rows is not None:
        return SharedPivotLinear(*sizes, spec.rank, *spec.own_rows, bias, **place)
    if spec.form == "pivot":
        return PivotLinear(*sizes, spec.rank, bias, **place, in_order=spec.in_order)
    with torch.device("meta"):
        new = Conv1D(*reversed(sizes)) if isinstance(old, Conv1D) else nn.Linear(*sizes, bias)
    return _materialised(new, **place)


def _materialised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).to_empty(device=device)


def _share_bases(model: Any, owners: Mapping[str, str]) -> None:
    if not owners:
        return
    ties = {_basis_key(model, name): _basis_key(model, owner) for name, owner in owners.items()}
    for target, source in ties.items():
        parent, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    # Semi-private, but the only way: from_pretrained ties what the first lists, save_pretrained drops what the
    # second lists, whose keys and values are regular expressions.
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}
    exact = {_exactly(key): _exactly(value) for key, value in ties.items()}
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **exact}


def _basis_key(model: nn.Module, name: str) -> str:
    shared_pivot = isinstance(model.get_submodule(name), SharedPivotLinear)
    return f"{name}.basis.weight" if shared_pivot else f"{name}.basis"


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _without(mapping: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _check_stored(model: Any, names: Sequence[str], checkpoint_files: Iterable[str | Path]) -> None:
    """A tensor that a folder lacks would stay uninitialised, and one that has no place in its module would be left
    out: transformers only reports either, and goes on."""
    files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
    if not files:
        return
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix): shape for file in files for key, shape in _shapes(file).items()}
    needed = {
        f"{name}.{key}": tuple(tensor.shape)
        for name in names
        for key, tensor in model.get_submodule(name).state_dict().items()
    }
    missing = sorted(
        key for key in needed.keys() - model.all_tied_weights_keys.keys() if key.removeprefix(prefix) not in stored
    )
    if missing:
        raise FormatError(
            f"{missing[0]} ({len(missing)} such) is in no weight file: the folder is incomplete, copy it again"
        )
    expected = {key.removeprefix(prefix): shape for key, shape in needed.items()}
    specified = {name.removeprefix(prefix) for name in names}
    for key, shape in sorted(stored.items()):
        owner = next((name for name in _parents(key) if name in specified), None)
        if owner is not None and expected.get(key) != shape:
            raise FormatError(
                f"{key} is stored with shape {shape}, but the spec of {owner} makes it {expected.get(key, 'absent')}: "
                "config.json is not that of these weights, copy the folder again"
            )
    # Not of heads, which from_pretrained may be told to replace by others.
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in specified:
            plain = tuple(module.weight.shape)
            if (shape := stored.get(f"{name}.weight", plain)) != plain:
                raise FormatError(
                    f"{name}.weight is stored with shape {shape}, not {plain}, but quantization_config.modules has no "
                    f"spec of {name}: config.json is not that of these weights, copy the folder again"
                )


def _shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def _parents(key: str) -> Iterator[str]:
    """The modules that a tensor is in, innermost first."""
    while key := key.rpartition(".")[0]:
        yield key


@torch.no_grad()
def _dense(name: str, module: Any, original: Any) -> nn.Module:
    """The module as the architecture has it: `original` is its skeleton on the meta device."""
    if isinstance(module, type(original)) and _sizes(module) == _sizes(original):
        return module
    weight, bias = _dense_weight(module), module.bias
    n_out, n_in = _sizes(original)
    # A fused gate and up projection is split in the middle: each half gets its own zeros.
    parts = 2 if role_of(name) == "gate_up" else 1
    weight = _padded(F.pad(weight, (0, n_in - weight.shape[1])), n_out, parts)
    new: Any = _materialised(original, weight.device, weight.dtype)
    new.weight.copy_(weight.T if isinstance(new, Conv1D) else weight)
    if bias is not None:
        new.bias.copy_(_padded(bias, n_out, parts))
    return new


def _dense_weight(module: Any) -> Tensor:
    if isinstance(module, Conv1D):
        return module.weight.T
    return module.weight if isinstance(module, nn.Linear) else module.dense_weight()


def _padded(rows: Tensor, n: int, parts: int) -> Tensor:
    blocks = rows.unflatten(0, (parts, -1))
    full = blocks.new_zeros(parts, n // parts, *rows.shape[1:])
    full[:, : blocks.shape[1]] = blocks
    return full.flatten(0, 1)


register()
