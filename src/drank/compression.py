"""Put the ranks of an allocation into a model. Knows tensors and modules; files and folders belong to the stage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drank.language_model.modules import FactorLinear, PivotLinear
from drank.language_model.plugin import attach, swap_modules
from drank.pivot import pivot_rows

Factors = tuple[Tensor, ...]

# Coefficients of the pivot form are stored in bfloat16; rows chosen by pivoted QR keep them near 1. One of this size
# would mean rows that nearly repeat each other, whose rounding errors it multiplies.
LARGEST_COEFFICIENT = 64.0


class UnsafePivotError(ValueError):
    """A unit's rows are too nearly dependent to be stored in pivot form; the message says what to do instead."""


def module_specs(units: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What config.json says of each compressed module, from the units of an allocation; dense units are not listed."""
    return {
        unit["name"]: {
            "form": unit["form"],
            "rank": unit["rank"],
            "out_features": unit["out_features"],
            "in_features": unit["in_features"],
        }
        for unit in units
        if unit["form"] != "dense"
    }


@torch.no_grad()
def compress(
    model: nn.Module,
    specs: dict[str, dict[str, Any]],
    read_factors: Callable[[str, int], Factors],
    provenance: Mapping[str, Any],
) -> nn.Module:
    """Replace the modules named in specs by factored ones, in place, and make the model saveable.

    Args:
        read_factors: (name, k) -> output vectors (k, out) and input vectors (k, in) of the rank-k slice.
        provenance: goes to config.json under ``quantization_config.provenance``.

    With nothing to replace (the dense variant) the model is returned as it is, a plain one.
    """
    if not specs:
        return model
    swap_modules(model, specs)
    for name, spec in specs.items():
        output_vectors, input_vectors = read_factors(name, spec["rank"])
        _fill(name, model.get_submodule(name), output_vectors, input_vectors)
    return attach(model, specs, dict(provenance))


def _fill(name: str, module: nn.Module, output_vectors: Tensor, input_vectors: Tensor) -> None:
    if isinstance(module, FactorLinear):
        module.weight.copy_(output_vectors.T)
        module.basis.copy_(input_vectors)
        return
    if not isinstance(module, PivotLinear):
        raise TypeError(f"{name}: a {type(module).__name__} cannot hold factors")
    form = pivot_rows(output_vectors.T, input_vectors)
    if form.max_abs_coefficient > LARGEST_COEFFICIENT:
        raise UnsafePivotError(
            f"{name}: pivot coefficients reach {form.max_abs_coefficient:.3g}, above {LARGEST_COEFFICIENT:g}, and "
            f"bfloat16 would lose the layer; use storage 'factors', or list it under covariance.ignore"
        )
    module.weight.copy_(form.kept)
    module.coefficients.copy_(form.coefficients)
    module.order.copy_(form.order)
