r"""LoRA by peft on compressed layers (arXiv:2106.09685): an adapter beside the `weight` of each.

.. math:: \text{weight} + \frac{\alpha}{ρ} B A, \qquad A: (ρ, n), \quad B: (m, ρ), \quad \text{weight}: (m, n)

`weight` is one matrix of the form: A in two factors, the kept rows of a pivot layer, the coefficients of a shared one.
So merging adds the product to it, and the layer keeps its form, its rank and its size. A sum of W (out, in) of rank r
and an adapter beside W has rank r + ρ, which the form could not hold; a basis that modules share stays as it is.

Importing this module makes peft know the layers; ``import drank`` arranges for that once peft is there.
"""

from typing import Any, cast

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn

from drank.model.layers import LowRankLinear


class LoraLowRankLinear(Linear):
    """An adapted layer. ``all-linear`` of a further adapter finds it by the word in its class's name."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = False  # peft sets it for the Conv1D layers of a model

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        n_out, n_in = module.weight.shape
        return n_in, n_out

    def resolve_lora_variant(self, **options: Any) -> None:
        if (variant := super().resolve_lora_variant(**options)) is not None:
            raise ValueError(f"{type(variant).__name__} needs a dense weight: compressed layers take plain LoRA only")

    def update_layer(self, adapter_name: str, *arguments: Any, **options: Any) -> None:
        super().update_layer(adapter_name, *arguments, **options)
        if self.lora_bias[adapter_name]:
            raise ValueError("lora_bias is True: compressed layers take adapters without a bias; set it to False")

    def forward(self, x: Tensor, *_: Any, adapter_names: Any = None, **__: Any) -> Tensor:
        if adapter_names is not None:
            raise ValueError("adapter_names: compressed layers take one adapter for a whole batch; use set_adapter")
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapted = not self.disable_adapters and not self.merged
        return self.base_layer(x, self._adapter if adapted else None)

    def _adapter(self, x: Tensor) -> Any:
        total: Any = 0
        for name in self.active_adapters:
            if name in self.lora_A:
                A, B = cast(nn.Linear, self.lora_A[name]), self.lora_B[name]
                inner = A(self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))
                total = total + B(inner) * self.scaling[name]
        return total


def _adapt(target: nn.Module, adapter_name: str, parameter_name: str | None = None, **options: Any) -> nn.Module:
    if getattr(target, "grid", None):
        raise ValueError(
            "a compressed layer of this model is rounded to few bits, to which no adapter could be merged: take the "
            "model that model.dequantize() gives, or a variant without `precision`"
        )
    if parameter_name is not None:  # LoraConfig.target_parameters
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, **options)
    return LoraLowRankLinear(target, adapter_name, **options)


_post_init = LoraConfig.__post_init__


def _registering(config: LoraConfig) -> None:
    """peft has this register per config alone."""
    _post_init(config)
    config._register_custom_module({LowRankLinear: _adapt})  # type: ignore[dict-item]  # any maker of a module


LoraConfig.__post_init__ = _registering  # type: ignore[method-assign]
