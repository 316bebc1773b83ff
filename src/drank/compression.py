"""Put the ranks of an allocation into a model. Knows tensors and modules; files and folders belong to the stage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drank.language_model.modules import FactorLinear
from drank.language_model.plugin import attach, swap_modules

Factors = tuple[Tensor, ...]


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
        module = model.get_submodule(name)
        if not isinstance(module, FactorLinear):
            raise TypeError(f"{name}: form {spec['form']!r} was not replaced by a factored linear")
        module.weight.copy_(output_vectors.T)
        module.basis.copy_(input_vectors)
    return attach(model, specs, dict(provenance))
