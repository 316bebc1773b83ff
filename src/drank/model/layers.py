"""Layers in the place of a linear: two factors, or rows kept verbatim with coefficients for the others, where the rows
are the layer's own or shared by several.

In all, the tensor called `weight` has another shape than the dense weight of that name. That is deliberate: a
loader that does not know the format stops at the mismatch, where a new name would leave it with random weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactorLinear(nn.Module):
    r"""Linear layer of rank r in two factors.

    .. math:: y = A (B x) + b, \qquad A: \text{weight } (out, r), \quad B: \text{basis } (r, in)

    `basis` may be one Parameter of several modules. A new module is uninitialised, as it is about to be filled.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.basis = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(cls, weight: Tensor, basis: Tensor, bias: Tensor | None = None) -> "FactorLinear":
        """Module around given tensors, without copies; a basis that already is a Parameter is shared.

        Raises:
            ValueError: weight (out, r), basis (r, in) and bias (out,) do not fit together.
        """
        _check_product("weight", weight, "basis", basis)
        _check_bias(bias, len(weight))
        module = cls(basis.shape[1], len(weight), len(basis), bias=bias is not None, device="meta")
        module.weight, module.basis = _parameter(weight), _parameter(basis)
        module.bias = None if bias is None else _parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.basis), self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        """W = weight @ basis (out, in), multiplied in float32 or better and rounded once."""
        return _product(self.weight, self.basis).to(self.weight.dtype)

    @property
    def n_parameters(self) -> int:
        """r (out + in), the price of the layer without the bias; a shared basis counts in each module."""
        return self.weight.numel() + self.basis.numel()

    def extra_repr(self) -> str:
        return _describe(self)


class _OrderedLinear(nn.Module):
    """Linear layer computed as two blocks of output features, kept and rest; `places` says where each feature is, or
    is None where what reads the outputs takes them as they are computed."""

    places: Tensor | None

    @property
    def index_bytes(self) -> int:
        """Size of `places`, 4 bytes per output feature: on disk and in memory, on top of the parameters."""
        return 0 if self.places is None else self.places.numel() * self.places.element_size()

    def _in_order(self, kept: Tensor, rest: Tensor) -> Tensor:
        # On CPU a gather with one index for all tokens is the fastest way: two index_copy take up to twice as long,
        # index_select in bfloat16 up to three times (benchmarks/output_order.py). gather wants int64.
        y = torch.cat([kept, rest], -1)
        return y if self.places is None else y.gather(-1, self.places.long().expand_as(y))

    def _rows_in_order(self, kept: Tensor, rest: Tensor) -> Tensor:
        rows = torch.cat([kept, rest])
        return rows if self.places is None else rows.index_select(0, self.places.long())


class PivotLinear(_OrderedLinear):
    r"""Linear layer of rank r as r of its own rows, and coefficients that give the others.

    .. math:: h = K x, \qquad y = [h; C h]_{places} + b

    K = `weight` (r, in), C = `coefficients` (out - r, r), `places` (out,) int32, where in [h; C h] each output
    feature is: r (out + in - r) parameters without the bias, and 4 out bytes of places. With `in_order`, output
    features are numbered as they are computed, and there are no places. A new module is uninitialised but for
    `places`, the identity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        in_order: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.in_order = in_order
        identity = None if in_order else torch.arange(out_features, device=device, dtype=torch.int32)
        self.register_buffer("places", identity)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, kept: Tensor, coefficients: Tensor, order: Tensor | None = None, bias: Tensor | None = None
    ) -> "PivotLinear":
        """Module around given tensors, without copies.

        Args:
            order: (out,), the output feature that entry i of [h; C h] is, as in :class:`drank.method.pivot.PivotForm`;
                None for feature i itself.

        Raises:
            ValueError: kept (r, in), coefficients (out - r, r), order (out,) and bias (out,) do not fit
                together, or `order` is not a permutation.
        """
        _check_product("coefficients", coefficients, "kept", kept)
        n_out = len(kept) + len(coefficients)
        if order is not None:
            _check_order(order, n_out)
        _check_bias(bias, n_out)
        module = cls(kept.shape[1], n_out, len(kept), bias=bias is not None, device="meta", in_order=order is None)
        module.weight, module.coefficients = _parameter(kept), _parameter(coefficients)
        module.places = None if order is None else places(order).to(kept.device)
        module.bias = None if bias is None else _parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        kept = F.linear(x, self.weight)
        y = self._in_order(kept, F.linear(kept, self.coefficients))
        return y if self.bias is None else y.add_(self.bias)

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are; the others in float32 or better, rounded once."""
        rest = _product(self.coefficients, self.weight).to(self.weight.dtype)
        return self._rows_in_order(self.weight, rest)

    @property
    def n_parameters(self) -> int:
        """r (out + in - r), the price of the layer, without the bias and the `index_bytes`."""
        return self.weight.numel() + self.coefficients.numel()

    def extra_repr(self) -> str:
        return _describe(self) + (", in_order=True" if self.in_order else "")


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


class SharedPivotLinear(_OrderedLinear):
    r"""Linear layer of rank r whose rows are some of the rows of a shared basis, and combinations of all of them.

    .. math:: h = K x, \qquad y = [h_{first:first+kept}; C h]_{places} + b

    K = `basis.weight` (r, in), one Parameter of a group of modules: r rows that span the stack of their weights, of
    which `kept` are this module's own, from row `first` on. C = `weight` (out - kept, r), the coefficients; `places`
    (out,) int32, where in [h[first:first+kept]; C h] each output feature is. A group takes r (Σ out + in - r)
    parameters without biases, and 4 bytes of places an output feature.

    The coefficients and not the rows are called `weight`, since a module may have no row of its own. They are of
    another shape than the dense weight, (out, in) or transposed, for every r < in; a larger r would save nothing.
    A new module is uninitialised but for `places`, the identity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        first: int,
        kept: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first, self.kept = first, kept
        self.basis = Basis(nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype)))
        self.weight = nn.Parameter(torch.empty(out_features - kept, rank, device=device, dtype=dtype))
        self.register_buffer("places", torch.arange(out_features, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, basis: Tensor, first: int, coefficients: Tensor, order: Tensor, bias: Tensor | None = None
    ) -> "SharedPivotLinear":
        """Module around given tensors, without copies; a basis that already is a Parameter is shared. The rows of the
        basis that are kept are as many as `coefficients` lacks; `order` is that of
        :class:`drank.method.pivot.GroupMember`.

        Raises:
            ValueError: basis (r, in), coefficients (out - kept, r), order (out,) and bias (out,) do not fit
                together, `order` is not a permutation, or the kept rows are not among those of the basis.
        """
        _check_product("coefficients", coefficients, "basis", basis)
        n_out, rank = len(order), len(basis)
        _check_order(order, n_out)
        kept = n_out - len(coefficients)
        if kept < 0 or not 0 <= first <= rank - kept:
            raise ValueError(
                f"first is {first}, and {n_out} output features less {len(coefficients)} rows of coefficients leave "
                f"{kept} kept rows: they must be a slice of the {rank} rows of the basis"
            )
        _check_bias(bias, n_out)
        module = cls(basis.shape[1], n_out, rank, first, kept, bias=bias is not None, device="meta")
        module.basis.weight, module.weight = _parameter(basis), _parameter(coefficients)
        module.places = places(order).to(basis.device)
        module.bias = None if bias is None else _parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        h = self.basis(x)
        y = self._in_order(h[..., self._own_rows], F.linear(h, self.weight))
        return y if self.bias is None else y.add_(self.bias)

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are; the others in float32 or better, rounded once."""
        rest = _product(self.weight, self.basis.weight).to(self.weight.dtype)
        return self._rows_in_order(self.basis.weight[self._own_rows], rest)

    @property
    def n_parameters(self) -> int:
        """r (out + in - kept), without the bias and the `index_bytes`; the shared basis, r in, counts in each
        module."""
        return self.basis.weight.numel() + self.weight.numel()

    def extra_repr(self) -> str:
        return f"{_describe(self)}, first={self.first}, kept={self.kept}"

    @property
    def _own_rows(self) -> slice:
        return slice(self.first, self.first + self.kept)


def places(order: Tensor) -> Tensor:
    """The inverse permutation, int32: where in `order` each output feature is."""
    return order.long().argsort().int()


def _product(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _describe(module: FactorLinear | PivotLinear | SharedPivotLinear) -> str:
    return (
        f"in_features={module.in_features}, out_features={module.out_features}, rank={module.rank}, "
        f"bias={module.bias is not None}"
    )


def _check_product(left_name: str, left: Tensor, right_name: str, right: Tensor) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(
            f"{left_name} {tuple(left.shape)} times {right_name} {tuple(right.shape)} is no matrix product: "
            f"the columns of {left_name} must be the rows of {right_name}"
        )


def _check_order(order: Tensor, n_out: int) -> None:
    if not torch.equal(order.long().sort().values, torch.arange(n_out, device=order.device)):
        raise ValueError(f"order must hold each of 0 ... {n_out - 1} once; it has shape {tuple(order.shape)}")


def _check_bias(bias: Tensor | None, n_out: int) -> None:
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; a layer with {n_out} output features needs ({n_out},)")
