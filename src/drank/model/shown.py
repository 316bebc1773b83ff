r"""Compressed layers as plain linears, for programs that look for ``nn.Linear``: quantisers and adapters.

.. math:: h = \text{inner}(x), \qquad y = [h_{kept}; \text{outer}(h)]_{places} + b \quad\text{or}\quad \text{outer}(h)

`inner` (r, in) and `outer` have the layer's own parameters, no copies. A basis of several layers is the `inner` of the
first alone, and the others ask that one: a program that walks over the modules meets, and changes, it once.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from drank.model.layers import FactorLinear, LowRankLinear, SharedPivotLinear
from drank.model.quantizer import DrankQuantizer, exactly, without

Model = TypeVar("Model", bound=nn.Module)
OF_TRANSFORMERS = ("hf_quantizer", "all_tied_weights_keys", "_tied_weights_keys")


class ShownError(ValueError):
    """A model whose layers cannot be shown as linears, or not be turned back; the message says which and why."""


class ShownLinear(nn.Module):
    """The compressed layer that is shown, in two linears; no nn.Linear itself, so that nothing replaces it whole."""

    inner: nn.Module
    outer: nn.Module | None
    places: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Any, owner: "ShownLinear | None") -> None:
        super().__init__()
        # In tuples, which hide modules: neither is a child.
        self._layer, self._owner = (layer,), (owner,)
        factors = isinstance(layer, FactorLinear)
        spanning, combining = (layer.get_parameter(name) for name in (layer.spanning, layer.combining))
        if owner is None:
            self.inner = linear(spanning)
        first = layer.first if isinstance(layer, SharedPivotLinear) else 0
        kept = layer.kept if isinstance(layer, SharedPivotLinear) else layer.rank
        self._kept = None if factors else slice(first, first + kept)
        self.outer = linear(combining, layer.bias if factors else None) if len(combining) else None
        self.register_buffer("places", layer.places)
        self.register_parameter("bias", None if factors else layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in), bit by bit that of the layer."""
        (owner,) = self._owner
        h = (owner or self).inner(x)
        if self._kept is None:
            assert self.outer is not None  # factors have one
            return self.outer(h)
        kept = h[..., self._kept]
        y = torch.cat([kept, self.outer(h)], -1) if self.outer is not None else kept
        y = y if self.places is None else y.gather(-1, self.places.long().expand_as(y))
        return y if self.bias is None else y + self.bias

    def layer(self) -> Any:
        """The compressed layer, which takes the parameters of the linears; None if these are no plain ones any more."""
        (layer,), (owner,) = self._layer, self._owner
        linears = {layer.spanning: (owner or self).inner} | ({layer.combining: self.outer} if self.outer else {})
        if not all(_is_plain(linear, layer.get_parameter(key)) for key, linear in linears.items()):
            return None
        for key, linear in linears.items():
            parent, _, own = key.rpartition(".")
            setattr(layer.get_submodule(parent), own, linear.weight)
        layer.bias = self.bias if self._kept else linears[layer.combining].bias
        layer.places = self.places
        return layer


class ShownQuantizer(DrankQuantizer):
    """In the place of the quantizer while layers are shown: a saved folder would have names that no format has."""

    held: dict[str, Any]  # what the model had before

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        raise ShownError(
            "the compressed layers of this model are shown as linears, which a compressed folder has no names for: "
            "save drank.as_compressed(model), or model.state_dict() where its linears were quantised"
        )

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return as_compressed(model).hf_quantizer._dequantize(model, dtype)


def as_linears(model: Model) -> Model:
    """Show every compressed layer as an `inner` and an `outer` nn.Linear, in place; outputs stay the same bit by bit.

    Raises:
        ShownError: nothing is compressed, or layers or embeddings are rounded already; the model is as it was.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if not isinstance(quantizer, DrankQuantizer) or not layers:
        raise ShownError(
            f"{type(model).__name__} has no compressed layer to show: give the model that from_pretrained made of a "
            "compressed folder, before anything wraps it"
        )
    if rounded := [name for name, spec in quantizer.quantization_config.specs.items() if spec.bits]:
        raise ShownError(
            f"{rounded[0]} and {len(rounded) - 1} others are rounded to few bits already: take the model that "
            "model.dequantize() gives, or a variant without `precision` and `embedding_bits`"
        )
    owners: dict[int, ShownLinear] = {}
    for name, layer in layers:
        basis = id(layer.get_parameter(str(layer.spanning)))
        shown = ShownLinear(layer, owners.get(basis))
        owners.setdefault(basis, shown)
        model.set_submodule(name, shown)
    kept: Any = model
    held = {key: getattr(kept, key) for key in OF_TRANSFORMERS}
    kept.hf_quantizer = ShownQuantizer(quantizer.quantization_config, pre_quantized=True)
    kept.hf_quantizer.held = held
    # Ties between names that are no longer there, which transformers would look up.
    ties = {key for key in kept.all_tied_weights_keys if key.startswith(tuple(f"{name}." for name, _ in layers))}
    kept.all_tied_weights_keys = without(kept.all_tied_weights_keys, ties)
    kept._tied_weights_keys = without(kept._tied_weights_keys or {}, {exactly(key) for key in ties})
    return model


def as_compressed(model: Model) -> Model:
    """Turn the layers that :func:`as_linears` shows back, in place, with the numbers that they have now.

    Raises:
        ShownError: no layer is shown, or linears are no longer plain ones; the model is as it was.
    """
    layers = {name: module.layer() for name, module in _shown(model)}
    if not layers:
        raise ShownError(f"{type(model).__name__} shows no compressed layer as linears: there is nothing to turn back")
    if changed := [name for name, layer in layers.items() if layer is None]:
        raise ShownError(
            f"{changed[0]} and {len(changed) - 1} others were quantised, wrapped or given other weights, which a "
            "compressed layer cannot hold: merge or unload what changed them, or keep the model as it is"
        )
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    kept: Any = model
    for key, value in kept.hf_quantizer.held.items():
        setattr(kept, key, value)
    return model


def _shown(model: nn.Module) -> Iterator[tuple[str, ShownLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ShownLinear))


def linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    """The linear of these parameters themselves, which other modules may have too."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight, made.bias = weight, bias  # type: ignore[assignment]
    return made


def _is_plain(module: Any, old: nn.Parameter) -> bool:
    # Exact types: quantisers and adapters derive theirs from these.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.shape == old.shape
