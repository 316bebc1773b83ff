"""Layers in the place of a linear: two factors, or rows kept verbatim with coefficients for the others, where the rows
are the layer's own or shared by several. ``FORMS`` is the table of them.

In every form the tensor called `weight` has another shape than the dense weight of that name. That is deliberate: a
loader that does not know the format stops at the mismatch, where a new name would leave it with random weights.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


class LowRankLinear(nn.Linear):
    """A linear layer (out, in) of rank r in a form of its own: base of the classes in :data:`FORMS`.

    A new module is uninitialised, as it is about to be filled; `places` is the identity. It is an nn.Linear for
    programs that look for linears, such as peft, though its `weight` is another matrix.

    Attributes:
        keys: what a spec in config.json has beside form, sizes, rank and basis; each is an argument of the class.
        basis_name: the tensor that several modules may have in common.
        shared: the class of modules that share their basis, where that is another.
        columns, rows: the tensor whose columns are the input features, and the one whose rows are the output features.
            An MLP whose matrices all say both can have its channels renumbered.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    basis_name: ClassVar[str | None] = None
    shared: ClassVar["type[LowRankLinear] | None"] = None
    columns: ClassVar[str | None] = None
    rows: ClassVar[str | None] = None
    basis: Any  # a Parameter, or the module Basis
    places: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **keys: Any,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make the dense weight
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        for key in self.keys:
            setattr(self, key, keys[key])
        self.register_buffer("places", None)
        for name, shape in self.shapes(in_features, out_features, rank, **keys).items():
            if name == "places":
                self.places = torch.arange(*shape, device=device, dtype=torch.int32)
                continue
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if name == "basis.weight":
                self.basis = Basis(parameter)
            else:
                self.register_parameter(name, parameter)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        """Name and shape of every stored tensor but the bias. All are floating-point but `places`, int32."""
        raise NotImplementedError

    @staticmethod
    def largest_rank(in_features: int, out_features: int) -> int:
        """The largest rank at which `weight` has another shape than the dense weight or its transpose."""
        return in_features - 1

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        """y (..., out) of x (..., in). ``adapter`` is a map beside `weight`: same input, its output is added."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """W (out, in), products in float32 or better and rounded once."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        own = "".join(f", {key}={getattr(self, key)}" for key in self.keys)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{own}"
        )

    def _times_weight(self, x: Tensor, adapter: Any) -> Tensor:
        y = F.linear(x, self.weight)
        return y if adapter is None else (y + adapter(x)).to(y.dtype)

    def _in_order(self, kept: Tensor, rest: Tensor) -> Tensor:
        # On CPU a gather with one index for all tokens is the fastest way: two index_copy take up to twice as long,
        # index_select in bfloat16 up to three times (benchmarks/output_order.py). gather wants int64.
        y = torch.cat([kept, rest], -1)
        y = y if self.places is None else y.gather(-1, self.places.long().expand_as(y))
        return y if self.bias is None else y.add_(self.bias)

    def _rows_in_order(self, kept: Tensor, rest: Tensor) -> Tensor:
        rows = torch.cat([kept, rest])
        return rows if self.places is None else rows.index_select(0, self.places.long())


class FactorLinear(LowRankLinear):
    r"""Linear layer of rank r in two factors.

    .. math:: y = A (B x) + b, \qquad A: \text{weight } (out, r), \quad B: \text{basis } (r, in)

    `basis` may be one Parameter of several modules: r (Σ out + in) parameters without biases.
    """

    basis_name = columns = "basis"
    rows = "weight"

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        return {"weight": (out_features, rank), "basis": (rank, in_features)}

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        h = F.linear(x, self.basis)
        y = F.linear(h, self.weight, self.bias)
        return y if adapter is None else (y + adapter(h)).to(y.dtype)

    def dense_weight(self) -> Tensor:
        return _product(self.weight, self.basis)


class Basis(nn.Module):
    """Rows (r, in), called `weight`, of which several modules have the one Parameter.

    A module of its own and no mere Parameter, since transformers, where it ties a tensor, also cuts the bias beside
    that tensor to the length of the `weight` beside it: right for an output embedding, wrong for coefficients.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SharedPivotLinear(LowRankLinear):
    r"""Linear layer of rank r whose rows are some of the rows of a shared basis, and combinations of all of them.

    .. math:: h = K x, \qquad y = [h_{first:first+kept}; C h]_{places} + b

    K = `basis.weight` (r, in), one Parameter of a group of modules: r rows that span the stack of their weights.
    `kept` of them are this module's own, from row `first` on. C = `weight` (out - kept, r), the coefficients; `places`
    (out,) int32, where in [h[first:first+kept]; C h] each output feature is. A group takes r (Σ out + in - r)
    parameters without biases, and 4 bytes of places per output feature.

    The coefficients and not the rows are called `weight`, since a module may have no row of its own. They are of
    another shape than the dense weight, (out, in) or transposed, for every r < in; a larger r would save nothing.
    """

    first: int
    kept: int
    keys = ("first", "kept")
    basis_name = "basis.weight"

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        coefficients = (out_features - keys["kept"], rank)
        return {"basis.weight": (rank, in_features), "weight": coefficients, "places": (out_features,)}

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        h = self.basis(x)
        return self._in_order(h[..., self._own_rows], self._times_weight(h, adapter))

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are, the others rounded once."""
        return self._rows_in_order(self.basis.weight[self._own_rows], _product(self.weight, self.basis.weight))

    @property
    def _own_rows(self) -> slice:
        return slice(self.first, self.first + self.kept)


class PivotLinear(LowRankLinear):
    r"""Linear layer of rank r as r of its own rows, and coefficients that give the others.

    .. math:: h = K x, \qquad y = [h; C h]_{places} + b

    K = `weight` (r, in), C = `coefficients` (out - r, r), `places` (out,) int32, where in [h; C h] each output
    feature is: r (out + in - r) parameters without the bias, and 4 out bytes of places. With `in_order`, output
    features are numbered as they are computed, and there are no places.
    """

    in_order: bool
    coefficients: Tensor
    keys = ("in_order",)
    shared = SharedPivotLinear
    columns, rows = "weight", "places"

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        shapes: Shapes = {"weight": (rank, in_features), "coefficients": (out_features - rank, rank)}
        return shapes if keys["in_order"] else shapes | {"places": (out_features,)}

    @staticmethod
    def largest_rank(in_features: int, out_features: int) -> int:
        return min(in_features, out_features - 1)

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        h = self._times_weight(x, adapter)
        return self._in_order(h, F.linear(h, self.coefficients))

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are, the others rounded once."""
        return self._rows_in_order(self.weight, _product(self.coefficients, self.weight))


# The form that a spec in config.json names -> its class. "dense", a smaller nn.Linear or Conv1D, is in no table.
# A new form is a row here, one of PRICES (method/allocation/units.py) and one of LAYOUTS (steps/compression.py).
FORMS: dict[str, type[LowRankLinear]] = {"factors": FactorLinear, "pivot": PivotLinear}


def places(order: Tensor) -> Tensor:
    """The inverse permutation, int32: where in `order` each output feature is."""
    return order.long().argsort().int()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or better, rounded once to the dtype of a."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
