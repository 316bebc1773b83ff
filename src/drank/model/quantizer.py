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
from drank.model.format import FORMAT_VERSION, FormatError, Spec, parse
from drank.model.forms import check_specs, class_of, keys_of
from drank.model.layers import LowRankLinear
from drank.model.linears import role_of

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
        names = [_name_in(model, name) for name in self.quantization_config.specs]
        bases = {key for name in names if (key := _basis_key(model, name))}
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


def _swap(model: nn.Module, specs: Mapping[str, Spec]) -> list[str]:
    """Put the modules of the specs in place, uninitialised, and return their names in this model."""
    names: dict[str, str] = {}
    for name, spec in specs.items():
        if (inside := _name_in(model, name)) in names.values():
            raise FormatError(f"{name}: another key of quantization_config.modules is also {inside}; remove one")
        names[name] = inside
        _check_fit(model, inside, spec)
    for name, spec in specs.items():
        model.set_submodule(names[name], _replacement(model.get_submodule(names[name]), spec))
    _share_bases(model, {names[n]: names[s.basis] for n, s in specs.items() if s.basis is not None and s.basis != n})
    return list(names.values())


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


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and not isinstance(module, LowRankLinear)


def _sizes(module: Any) -> tuple[int, int]:
    """(out, in) of a linear of any form."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _replacement(old: Any, spec: Spec) -> nn.Module:
    if spec.form == "dense" and (spec.out_features, spec.in_features) == _sizes(old):
        return old
    bias, place = old.bias is not None, {"device": old.weight.device, "dtype": old.weight.dtype}
    if spec.form != "dense":
        new: Any = class_of(spec)(spec.in_features, spec.out_features, spec.rank or 0, bias, **place, **keys_of(spec))
    else:
        with torch.device("meta"):
            sizes = (spec.in_features, spec.out_features)
            new = Conv1D(*reversed(sizes)) if isinstance(old, Conv1D) else nn.Linear(*sizes, bias)
        new = _materialised(new, **place)
    if bias and spec.out_features == _sizes(old)[0]:
        new.bias = old.bias
    return new


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
    """The tensor of this module that others may share; the empty string where its form has none."""
    basis = getattr(model.get_submodule(name), "basis_name", None)
    return f"{name}.{basis}" if basis else ""


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _without(mapping: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _check_stored(model: Any, names: Sequence[str], checkpoint_files: Iterable[str | Path]) -> None:
    """A tensor that a folder lacks would stay uninitialised, and one that has no place in its module would be left
    out: transformers only reports either, and goes on. (It refuses a shape that is not the module's.)"""
    files = [file for file in checkpoint_files if str(file).endswith(".safetensors")]
    if not files:
        return
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix): shape for file in files for key, shape in _shapes(file).items()}
    for name in names:
        own = f"{name}.".removeprefix(prefix)
        needed = {own + key: tuple(tensor.shape) for key, tensor in model.get_submodule(name).state_dict().items()}
        tied = {
            key for key in needed if key in model.all_tied_weights_keys or prefix + key in model.all_tied_weights_keys
        }
        if missing := sorted(needed.keys() - stored.keys() - tied):
            raise FormatError(f"{missing[0]} is in no weight file: the folder is incomplete, copy it again")
        for key in sorted(key for key in stored if key.startswith(own)):
            if stored[key] != needed.get(key):
                raise FormatError(
                    f"{key} is stored with shape {stored[key]}, but the spec of {name} makes it "
                    f"{needed.get(key, 'absent')}: config.json is not that of these weights, copy the folder again"
                )


def _shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


@torch.no_grad()
def _dense(name: str, module: Any, original: Any) -> nn.Module:
    """The module as the architecture has it: `original` is its skeleton on the meta device."""
    if _is_plain(module) and _sizes(module) == _sizes(original):
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
    if isinstance(module, LowRankLinear):
        return module.dense_weight()
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _padded(rows: Tensor, n: int, parts: int) -> Tensor:
    blocks = rows.unflatten(0, (parts, -1))
    full = blocks.new_zeros(parts, n // parts, *rows.shape[1:])
    full[:, : blocks.shape[1]] = blocks
    return full.flatten(0, 1)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(DrankConfig)
    register_quantizer(METHOD)(DrankQuantizer)
