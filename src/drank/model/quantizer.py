"""The compressed model as a plain Hugging Face folder: transformers' quantizer `drank`, for the section of format.py.

Importing this module registers the format; ``import drank`` arranges for that once transformers is there.
Without it ``from_pretrained`` stops with mismatched shapes, because every compressed module has a `weight` of
another shape than the dense one, for Conv1D's transposed weight too (``LowRankLinear.largest_rank``).
"""

import copy
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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
from drank.model.experts import fuse, unfuse
from drank.model.format import FORMAT_VERSION, SCALES, ZEROS, FormatError, Spec, parse
from drank.model.forms import check_specs, class_of, grid_of, keys_of
from drank.model.layers import LowRankLinear, RoundedEmbedding, RoundedHead
from drank.model.linears import PARTS, role_of

METHOD = "drank"
# Keys that transformers looks for in any quantization_config, and would do to ours.
NOT_OURS = ("dequantize", "load_in_4bit", "load_in_8bit")

Model = TypeVar("Model", bound=nn.Module)


def attach(model: Model, modules: Mapping[str, Any], provenance: Mapping[str, Any]) -> Model:
    """Replace modules of an in-memory model by the forms they are to be stored in, in place, and make it saveable.

    New modules have dtype and device of the old ones. Their bias is the old one where the output size is unchanged;
    everything else is uninitialised, to be filled by the caller. `dense` with unchanged sizes leaves the module alone.
    Modules that share a basis have one Parameter. An error leaves the model as it was.

    Args:
        modules: spec by dotted name (format.py); a name may have or lack the prefix of the bare decoder.
        provenance: what made this model; JSON values, kept in config.json as they are.

    Raises:
        FormatError: a malformed spec, or one that does not fit the model.
    """
    config = DrankConfig(modules=dict(modules), provenance=dict(provenance))
    _swap(model, config.specs)
    quantizer = DrankQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD  # type: ignore[assignment]
    model._weight_conversions = []  # type: ignore[assignment]  # what save_pretrained goes by
    return quantizer.postprocess_model(model)


class DrankConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed folder, given as its keys, whose values may be anything JSON can hold.

    Its attributes are saved as they are; ``specs`` has the modules as objects, parsed once.

    Raises:
        FormatError: a format_version that this version of drank does not read, a malformed value or spec, or a key
            that transformers would take for its own.
    """

    __slots__ = ("specs",)  # no entry of __dict__, which transformers saves
    specs: dict[str, Spec]

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
                f"quantization_config.format_version is {reprlib.repr(format_version)}; drank {__version__} reads "
                f"{FORMAT_VERSION}: {remedy}"
            )
        for key, value in unknown.items():
            if key in NOT_OURS or hasattr(type(self), key):
                raise FormatError(
                    f"quantization_config.{key} is {reprlib.repr(value)}; transformers has a meaning of its own for "
                    f"this name, and drank none: remove it"
                )
        modules, provenance = {} if modules is None else modules, {} if provenance is None else provenance
        self.specs = parse({"format_version": format_version, "modules": modules, "provenance": provenance}).modules
        check_specs(self.specs)
        own = {"quant_method": METHOD, "format_version": format_version}
        self.__dict__.update(unknown | own | {"modules": modules, "provenance": provenance})


class DrankQuantizer(HfQuantizer):
    """Builds the compressed modules before their weights are loaded, and turns them back into dense ones."""

    # Refuses from_pretrained(dense folder, quantization_config=DrankConfig(...)): loading is not compressing.
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        check_released(map(Path, checkpoint_files or []))
        names = _swap(model, self.quantization_config.specs)
        _check_stored(model, names, checkpoint_files or [])

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Plain modules of the architecture's sizes; exact up to rounding to the dtype of the model.

        Removed channels come back as zeros at the end: an MLP is a sum over its channels in any order, so zero
        ones add nothing. `dtype` is ignored: transformers passes the config's, which may differ from the
        weights' own.
        """
        with torch.device("meta"):
            original = type(model)(copy.deepcopy(model.config))
        unfuse(original, self.quantization_config.specs)
        names = list(_names_in(model, self.quantization_config.specs).values())
        bases = {key for name in names for key in _basis_keys(model, name)}
        for name in names:
            module, head = model.get_submodule(name), _tied_head(model, name)
            model.set_submodule(name, _dense(name, module, original.get_submodule(name)))
            if isinstance(module, RoundedEmbedding) and head:
                bases.add(f"{head}.weight_scales")
                plain = original.get_submodule(head)
                plain.weight = model.get_submodule(name).weight
                model.set_submodule(head, plain)
        fuse(model)
        del model._weight_conversions  # a plain model again, which transformers saves in its own way
        model.all_tied_weights_keys = without(model.all_tied_weights_keys, bases)
        model._tied_weights_keys = without(model._tied_weights_keys or {}, {exactly(key) for key in bases})
        return model

    def update_weight_conversions(self, *_: Any) -> list[Any]:
        """None: a compressed folder has its tensors under the names of their modules, which config.json speaks of.
        For some architectures transformers reads and writes the names of older checkpoints otherwise."""
        return []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return not any(spec.bits for spec in self.quantization_config.specs.values())

    @property
    def is_qat_trainable(self) -> bool:
        """Lets transformers.Trainer fine-tune factors; integers have no gradient."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        return True


def _swap(model: nn.Module, specs: Mapping[str, Spec]) -> list[str]:
    """Put the modules of the specs in place, uninitialised, and return their names in this model, and those of experts
    that were taken apart for them."""
    unfused = unfuse(model, specs)
    try:
        names = _names_in(model, specs)
        for name, inside in names.items():
            _check_fit(model, inside, specs[name])
    except FormatError:
        if unfused:
            fuse(model)
        raise
    ties: dict[str, str] = {}
    for name, inside in names.items():
        head = _tied_head(model, inside) if specs[name].form == "embedding" else None
        model.set_submodule(inside, _replacement(model.get_submodule(inside), specs[name]))
        if head:
            model.set_submodule(head, _replacement(model.get_submodule(head), specs[name]))
            model.get_submodule(head).weight = model.get_submodule(inside).weight  # a tie that transformers knows of
            ties[f"{head}.weight_scales"] = f"{inside}.weight_scales"
    for name, spec in specs.items():
        if spec.basis is not None and spec.basis != name:
            own, shared = (_basis_keys(model, names[module]) for module in (name, spec.basis))
            ties |= dict(zip(own, shared, strict=True))
    _share(model, ties)
    return [*names.values(), *unfused]


def _names_in(model: Any, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Names of the modules in this model; of an output head none, in a bare decoder."""
    names: dict[str, str] = {}
    for name, spec in specs.items():
        try:
            inside = _name_in(model, name)
        except FormatError:
            if spec.form == "embedding" and model.get_output_embeddings() is None and len(specs) > 1:
                continue
            raise
        if inside in names.values():
            raise FormatError(f"{name}: another key of quantization_config.modules is also {inside}; remove one")
        names[name] = inside
    return names


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


def _check_fit(model: nn.Module, name: str, spec: Spec) -> None:
    module = model.get_submodule(name)
    if spec.form == "embedding":
        _check_embedding(model, name, spec)
        return
    if not _is_plain(module):
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


def _check_embedding(model: Any, name: str, spec: Spec) -> None:
    module: Any = model.get_submodule(name)
    tables: dict[type, Any] = {nn.Embedding: model.get_input_embeddings(), nn.Linear: model.get_output_embeddings()}
    if type(module) not in tables or module is not tables[type(module)]:
        raise FormatError(
            f"{name} is {type(module).__name__}; form 'embedding' is for a model's plain input embedding or output head"
        )
    if tuple(module.weight.shape) != (spec.out_features, spec.in_features):
        raise FormatError(
            f"{name}: {spec.out_features} x {spec.in_features} (tokens x width), but the architecture has "
            f"{' x '.join(map(str, module.weight.shape))}"
        )
    others = _tied_to(model, name) - {_tied_head(model, name)}
    if others:
        raise FormatError(
            f"{name}: {min(others)} has the same weight and is no head without a bias: keep it in 16 bits"
        )


def _tied_to(model: Any, name: str) -> set[str]:
    """The other modules that have the weight of this one."""
    key, ties = f"{name}.weight", getattr(model, "all_tied_weights_keys", {})
    keys = {target for target, source in ties.items() if source == key} | ({ties[key]} if key in ties else set())
    return {other.removesuffix(".weight") for other in keys}


def _tied_head(model: Any, name: str) -> str | None:
    """The output head that is tied to this embedding, if any."""
    head = model.get_output_embeddings()
    return next((other for other in _tied_to(model, name) if _is_head(model.get_submodule(other), head)), None)


def _is_head(module: Any, head: Any) -> bool:
    return module is head and type(module) in (nn.Linear, RoundedHead) and module.bias is None


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, LowRankLinear | RoundedHead)


def _sizes(module: Any) -> tuple[int, int]:
    """(out, in) of a linear of any form."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _replacement(old: Any, spec: Spec) -> nn.Module:
    place: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    sizes, grid = (spec.in_features, spec.out_features), grid_of(spec)
    if spec.form == "embedding":
        table: Any = (RoundedHead if isinstance(old, nn.Linear) else RoundedEmbedding)(*sizes, **place)
        if isinstance(old, nn.Linear):
            table.bias = old.bias
        return table
    if spec.form == "dense" and grid is None and (spec.out_features, spec.in_features) == _sizes(old):
        return old
    bias = old.bias is not None
    if spec.form != "dense" or grid:
        n_in, n_out, keys = spec.in_features, spec.out_features, {**place, "grid": grid, **keys_of(spec)}
        new: Any = class_of(spec)(n_in, n_out, spec.rank or 0, bias, **keys)
    else:
        with torch.device("meta"):
            new = Conv1D(*reversed(sizes)) if isinstance(old, Conv1D) else nn.Linear(*sizes, bias)
        new = _materialised(new, **place)
    if bias and spec.out_features == _sizes(old)[0]:
        new.bias = old.bias
    return new


def _materialised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype).to_empty(device=device)


def _share(model: Any, ties: Mapping[str, str]) -> None:
    """Give modules the parameter of another, and let transformers save it once: key of a parameter to that it is."""
    if not ties:
        return
    for target, source in ties.items():
        parent, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(parent), attribute, model.get_parameter(source))
    # Semi-private, but the only way: from_pretrained ties what the first lists, save_pretrained drops what the
    # second lists, whose keys and values are regular expressions.
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **ties}
    exact = {exactly(key): exactly(value) for key, value in ties.items()}
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **exact}


def _basis_keys(model: nn.Module, name: str) -> list[str]:
    """The tensors of this module that others may share; none where its form has none."""
    module = model.get_submodule(name)
    basis = getattr(module, "basis_name", None)
    return [f"{name}.{key}" for key, _ in module.named_parameters() if basis and key in _tensors_of(basis)]


def _tensors_of(matrix: str) -> tuple[str, ...]:
    """Names of a matrix's tensors, rounded or not."""
    return matrix, matrix + SCALES, matrix + ZEROS


def exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def without(mapping: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _check_stored(model: Any, names: Sequence[str], checkpoint_files: Iterable[str | Path]) -> None:
    """A tensor that a folder lacks would stay uninitialised, and one that has no place in its module would be left
    out: transformers only reports either, and goes on. (It refuses a shape that is not the module's.)"""
    files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
    if not files:
        return
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix): shape for file in files for key, shape in _stored(file).items()}
    for name in names:
        own = f"{name}.".removeprefix(prefix)
        needed = {own + key: _described(tensor) for key, tensor in model.get_submodule(name).state_dict().items()}
        tied = {
            key for key in needed if key in model.all_tied_weights_keys or prefix + key in model.all_tied_weights_keys
        }
        if missing := sorted(needed.keys() - stored.keys() - tied):
            raise FormatError(f"{missing[0]} is in no weight file: the folder is incomplete, copy it again")
        for key in sorted(key for key in stored if key.startswith(own)):
            (shape, kind), (right_shape, right_kind) = stored[key], needed.get(key, ("absent", ""))
            if (shape, kind) != (right_shape, right_kind):
                told = f"with shape {shape}, but the spec of {name} makes it {right_shape}"
                if shape == right_shape:
                    told = f"as {kind}, but the spec of {name} makes it {right_kind}"
                raise FormatError(
                    f"{key} is stored {told}: config.json is not that of these weights, copy the folder again"
                )


def _stored(file: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of every tensor, and its type by safetensors' name, or "float" for any floating-point type."""
    with safe_open(file, "pt") as tensors:
        parts = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  not a mapping
        kinds = {key: part.get_dtype() for key, part in parts.items()}
        return {
            key: (tuple(part.get_shape()), "float" if "F" in kinds[key] else kinds[key]) for key, part in parts.items()
        }


def _described(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    """The same of a tensor in memory."""
    kinds = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32"}
    return tuple(tensor.shape), kinds.get(tensor.dtype, "float")


@torch.no_grad()
def _dense(name: str, module: Any, original: Any) -> nn.Module:
    """The module as the architecture has it: `original` is its skeleton on the meta device."""
    if _is_plain(module) and _sizes(module) == _sizes(original):
        return module
    weight = module.dense_weight() if hasattr(module, "dense_weight") else module.weight
    new: Any = _materialised(original, weight.device, weight.dtype)
    if isinstance(module, RoundedEmbedding):
        new.weight.copy_(weight)
        return new
    n_out, n_in = _sizes(original)
    # A fused gate and up projection is split in the middle: each half gets its own zeros.
    parts = PARTS.get(role_of(name) or "", 1)
    weight = weight.T if isinstance(module, Conv1D) else weight
    weight = _padded(F.pad(weight, (0, n_in - weight.shape[1])), n_out, parts)
    new.weight.copy_(weight.T if isinstance(new, Conv1D) else weight)
    if module.bias is not None:
        new.bias.copy_(_padded(module.bias, n_out, parts))
    return new


def _padded(rows: Tensor, n: int, parts: int) -> Tensor:
    blocks = rows.unflatten(0, (parts, -1))
    full = blocks.new_zeros(parts, n // parts, *rows.shape[1:])
    full[:, : blocks.shape[1]] = blocks
    return full.flatten(0, 1)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(DrankConfig)
    register_quantizer(METHOD)(DrankQuantizer)
