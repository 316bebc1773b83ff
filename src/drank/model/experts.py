"""Experts of a mixture as linears: transformers keeps them in two tensors (experts, out, in), which no hook sees into.

In the place of such a module comes one that computes the same from three linears per expert, so that everything else
takes an expert for an MLP. Calibration and compressed models have it; :func:`fuse` gives the architecture's own back.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """The matrices of one expert."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))


class ExpertsAsLinears(nn.Module):
    r"""Experts called by their numbers, ``0.gate_proj`` and so on.

    .. math:: y_t = \sum_{e \in \mathrm{chosen}(t)} p_{te} \, D_e \, a(G_e x_t, U_e x_t)

    An expert's linears see the tokens for which the router chose it, in order, and are not called without any.

    Attributes:
        fused: the architecture's module without its weights, which has the nonlinearity a. No submodule: transformers
            would look for its weights.
        gate_up_proj: how many experts there are. It is stored for its shape alone: a loader that does not know the
            format stops at the mismatch, where it would leave the dense weights of that name random.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        for number, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            self.add_module(str(number), Expert(gate, up, down))
        count = torch.tensor([len(fused.down_proj)], dtype=torch.int32)
        self.register_buffer("gate_up_proj", count.to(fused.down_proj.device))
        del fused.gate_up_proj, fused.down_proj
        self._fused = [fused]

    @property
    def fused(self) -> Any:
        return self._fused[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == number)
            found = self.run(number, hidden_states[token]) * top_k_weights[token, place, None]
            y.index_add_(0, token, found.to(y.dtype))
        return y

    def show_all(self) -> None:
        """Run every expert once, on a token of zeros, for whoever watches."""
        for number, expert in enumerate(self.children()):
            weight = expert.get_parameter("gate_proj.weight")
            self.run(number, weight.new_zeros(1, weight.shape[1]))

    def run(self, number: int, x: Tensor) -> Tensor:
        """One expert's output for tokens (n, in)."""
        expert: Any = self.get_submodule(str(number))
        # Gated by the architecture, which may clamp, and splits in the middle what it takes for a fused projection.
        return expert.down_proj(self.fused._apply_gate(torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that :func:`unfuse` knows, by name: whose class tells transformers' own kernels that it computes
    D a(G x, U x) with [G; U] stacked, without biases, and that hold nothing else."""
    return {name: module for name, module in model.named_modules() if _is_fused(module)}


def unfuse(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Put linears in the place of experts that the names are of, or lie in; returns the names of those modules.

    Args:
        names: of modules; they may have or lack the prefix of the bare decoder.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {path.removeprefix(prefix) for name in names for path in (name, ".".join(name.split(".")[:-2]))}
    found = {name: module for name, module in fused_experts(model).items() if name.removeprefix(prefix) in paths}
    for name, module in found.items():
        model.set_submodule(name, ExpertsAsLinears(module))
    return list(found)


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Give the architecture's modules back; all experts have plain linears of one size."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertsAsLinears):
            experts: list[Any] = list(module.children())
            gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
            module.fused.gate_up_proj = nn.Parameter(torch.stack(gate_up))
            module.fused.down_proj = nn.Parameter(torch.stack([expert.down_proj.weight for expert in experts]))
            model.set_submodule(name, module.fused)


def expert_of(model: nn.Module, linear: str) -> str | None:
    """Name of the expert that the linear of that name belongs to; None where it belongs to none."""
    parent = linear.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), Expert) else None


def _is_fused(module: Any) -> bool:
    plain = getattr(module, "has_gate", False) and getattr(module, "is_concatenated", False)
    others = ("is_transposed", "has_bias", "has_post_expert_norm")
    return (
        plain
        and not any(getattr(module, key, False) for key in others)
        and module.state_dict().keys() == {"gate_up_proj", "down_proj"}
    )


def _linear(weight: Tensor) -> nn.Linear:
    """A linear with a copy of the weight, so that the tensor of all experts can go."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear
