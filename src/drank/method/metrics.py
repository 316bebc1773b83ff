"""Two tables whose rows params.yaml may name: metrics, in which error is measured, and units, factored together.

``accepts`` names the parameters that a row reads. params.yaml is checked against it, so that no parameter is ignored.
docs/extending.md adds a row. Importing this module needs no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Given = Mapping[str, Any]  # parameters by name, at least those that a row accepts


@dataclass(frozen=True)
class Metric:
    """The error tr(G D H Dᵀ) of replacing W by W - D. None stands for the identity.

    Attributes:
        inputs: (tensors of inputs, given) -> H, (in, in) float64. The tensors are ``covariance`` and ``magnitude``.
        gradients: (tensors of output gradients, given) -> G, (out, out) float64. The tensor is ``covariance``.
        accepts: parameters of section ``spectrum`` that the two read.
        needs: accepted parameters that params.yaml must give.
        clipped: output gradients also have the tensor ``clipped``, which ``covariance.gradient_clip`` makes.
    """

    inputs: "Callable[[Tensors, Given], Tensor] | None" = None
    gradients: "Callable[[Tensors, Given], Tensor] | None" = None
    accepts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    clipped: bool = False


@dataclass(frozen=True)
class Units:
    """Matrices that are factored together.

    Attributes:
        shares_basis: consecutive layers may share a basis.
        loses_channels: MLPs may lose whole channels.
    """

    shares_basis: bool = False
    loses_channels: bool = False
    accepts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def damped(covariance: "Tensor", share: float) -> "Tensor":
    """The covariance, float64, plus ``share`` of its mean diagonal on the diagonal: no direction is entirely free."""
    lifted = covariance.double().clone()
    lifted.diagonal().add_(share * lifted.diagonal().mean())
    return lifted


def _inputs(tensors: Tensors, given: Given) -> "Tensor":
    return damped(tensors["covariance"], given["damping"])


def _gradients(tensors: Tensors, given: Given, name: str = "covariance") -> "Tensor":
    share = given["gradient_damping"]
    return damped(tensors[name], given["damping"] if share is None else share)


def _clipped(tensors: Tensors, given: Given) -> "Tensor":
    return _gradients(tensors, given, "clipped")


def _magnitudes(tensors: Tensors, given: Given) -> "Tensor":
    """ASVD: channels scaled by E|x_i|^alpha, so H is the diagonal of the squares."""
    return (tensors["magnitude"].double() ** (2 * given["alpha"])).diag()


METRICS = {
    "none": Metric(),
    "diagonal": Metric(_magnitudes, accepts=("alpha",), needs=("alpha",)),
    "input": Metric(_inputs, accepts=("damping",)),
    "kfac": Metric(_inputs, _gradients, accepts=("damping", "gradient_damping", "bits", "group_size")),
    "kfac_clipped": Metric(_inputs, _clipped, accepts=("damping", "gradient_damping"), clipped=True),
}

UNITS = {
    "matrix": Units(accepts=("sensitivity_windows", "sensitivity_ratios", "sensitivity_scores")),
    "group": Units(shares_basis=True, accepts=("layers", "even_with_grouped_heads"), needs=("layers",)),
    "block": Units(loses_channels=True, accepts=("cuts",), needs=("cuts", "damping")),
}
