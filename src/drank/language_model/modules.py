"""What replaces a linear layer: two factors, or rows kept verbatim with coefficients for the others.

In both, the tensor called `weight` has another shape than the dense weight of that name. That is deliberate: a
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


class PivotLinear(nn.Module):
    r"""Linear layer of rank r as r of its own rows, and coefficients that give the others.

    .. math:: h = K x, \qquad y_{order} = [h; C h] + b_{order}

    K = `weight` (r, in), C = `coefficients` (out - r, r), `order` (out,) int32, the output feature that entry
    i of [h; C h] is: r (out + in - r) parameters without the bias, and 4 out bytes of order. A new module is
    uninitialised but for `order`, the identity.
    """

    order: Tensor

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
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.register_buffer("order", torch.arange(out_features, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, kept: Tensor, coefficients: Tensor, order: Tensor, bias: Tensor | None = None
    ) -> "PivotLinear":
        """Module around given tensors, without copies (`order` is stored as int32).

        Raises:
            ValueError: kept (r, in), coefficients (out - r, r), order (out,) and bias (out,) do not fit
                together, or `order` is not a permutation.
        """
        _check_product("coefficients", coefficients, "kept", kept)
        n_out = len(kept) + len(coefficients)
        if not torch.equal(order.long().sort().values, torch.arange(n_out, device=order.device)):
            raise ValueError(f"order must hold each of 0 ... {n_out - 1} once; it has shape {tuple(order.shape)}")
        _check_bias(bias, n_out)
        module = cls(kept.shape[1], n_out, len(kept), bias=bias is not None, device="meta")
        module.weight, module.coefficients = _parameter(kept), _parameter(coefficients)
        module.order = order.to(kept.device, torch.int32)
        module.bias = None if bias is None else _parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        kept = F.linear(x, self.weight)
        y = self._in_order(kept, F.linear(kept, self.coefficients))
        return y if self.bias is None else y.add_(self.bias)

    def _in_order(self, kept: Tensor, rest: Tensor) -> Tensor:
        # Both parts go straight to their places. Concatenating and then gathering writes all twice: on CPU in
        # bfloat16 the whole layer took 1.2 to 2.3 times as long (512 tokens). index_copy_ wants int64.
        order = self.order.long()
        y = kept.new_empty(*kept.shape[:-1], self.out_features)
        return y.index_copy_(-1, order[: self.rank], kept).index_copy_(-1, order[self.rank :], rest)

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are; the others in float32 or better, rounded once."""
        rest = _product(self.coefficients, self.weight).to(self.weight.dtype)
        dense = self.weight.new_empty(self.out_features, self.in_features)
        return dense.index_copy(0, self.order.long(), torch.cat([self.weight, rest]))

    @property
    def n_parameters(self) -> int:
        """r (out + in - r), the price of the layer, without the bias and the `index_bytes`."""
        return self.weight.numel() + self.coefficients.numel()

    @property
    def index_bytes(self) -> int:
        """Size of `order`, 4 bytes an output feature: on disk and in memory, on top of the parameters."""
        return self.order.numel() * self.order.element_size()

    def extra_repr(self) -> str:
        return _describe(self)


def _product(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _describe(module: FactorLinear | PivotLinear) -> str:
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


def _check_bias(bias: Tensor | None, n_out: int) -> None:
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; a layer with {n_out} output features needs ({n_out},)")
