"""Layers in the place of a linear: two factors, or rows kept verbatim with coefficients for the others, where the rows
are the layer's own or shared by several. ``FORMS`` is the table of them. The matrices of each may be rounded to few
bits, and so may a whole linear and an embedding.

In every form the tensor called `weight` has another shape than the dense weight of that name. That is deliberate: a
loader that does not know the format stops at the mismatch, where a new name would leave it with random weights.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drank.method.precisions import Grid
from drank.model.format import SCALES, ZEROS
from drank.model.packing import Shapes, packed_shapes, unpacked

FEW = 4  # tokens up to which torch's product with integers beats their conversion, on a CPU


class LowRankLinear(nn.Linear):
    """A linear layer (out, in) of rank r in a form of its own: base of the classes in :data:`FORMS`.

    A new module is uninitialised, as it is about to be filled; `places` is the identity. It is an nn.Linear for
    programs that look for linears, such as peft, though its `weight` is another matrix.

    Attributes:
        keys: what a spec in config.json has beside form, sizes, rank, basis and precision; each is an argument of the
            class.
        basis_name: the matrix that several modules may have in common.
        spanning, combining: K and C, where W is some rows of K, and C K, in some order: what rounding with error
            feedback can make up for. Other forms are rounded to nearest alone.
        shared: the class of modules that share their basis, where that is another.
        columns, rows: the tensor whose columns are the input features, and the one whose rows are the output features.
            An MLP whose matrices all say both can have its channels renumbered.
    """

    keys: ClassVar[tuple[str, ...]] = ()
    basis_name: ClassVar[str | None] = None
    spanning: ClassVar[str | None] = None
    combining: ClassVar[str | None] = None
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
        grid: Grid | None = None,
        **keys: Any,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make the dense weight
        self.in_features, self.out_features, self.rank, self.grid = in_features, out_features, rank, grid
        for key in self.keys:
            setattr(self, key, keys[key])
        self.register_buffer("places", None)
        self._columns = {}
        for name, shape in self.shapes(in_features, out_features, rank, **keys).items():
            if name == "places":
                self.places = torch.arange(*shape, device=device, dtype=torch.int32)
                continue
            self._columns[name] = shape[1]
            holder, _, own = name.rpartition(".")
            if holder:
                setattr(self, holder, Basis())
            _register(self.get_submodule(holder), own, shape, grid, device, dtype)
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

    def matrix(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """A matrix by its name in :meth:`shapes`: as it is, or made of its integers, in ``dtype`` or the module's."""
        holder, _, own = name.rpartition(".")
        module: Any = self.get_submodule(holder)
        stored = getattr(module, own)
        if self.grid is None:
            return stored
        scales, zeros = getattr(module, own + SCALES), getattr(module, own + ZEROS)
        return unpacked(stored, scales, zeros, self.grid, self._columns[name], dtype or scales.dtype)

    def extra_repr(self) -> str:
        own = "".join(f", {key}={getattr(self, key)}" for key in self.keys)
        own += f", bits={self.grid.bits}, group={self.grid.group}" if self.grid else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{own}"
        )

    def _times_weight(self, x: Tensor, adapter: Any) -> Tensor:
        y = F.linear(x, self.matrix("weight", x.dtype))
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

    basis_name = spanning = columns = "basis"
    combining = rows = "weight"

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        return {"weight": (out_features, rank), "basis": (rank, in_features)}

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        h = F.linear(x, self.matrix("basis", x.dtype))
        y = F.linear(h, self.matrix("weight", x.dtype), self.bias)
        return y if adapter is None else (y + adapter(h)).to(y.dtype)

    def dense_weight(self) -> Tensor:
        return _product(self.matrix(), self.matrix("basis"))


class Basis(nn.Module):
    """Rows (r, in), called `weight`, of which several modules have the one Parameter.

    A module of its own and no mere Parameter, since transformers, where it ties a tensor, also cuts the bias beside
    that tensor to the length of the `weight` beside it: right for an output embedding, wrong for coefficients.
    """

    weight: Tensor


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
    basis_name = spanning = "basis.weight"
    combining = "weight"

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        coefficients = (out_features - keys["kept"], rank)
        return {"basis.weight": (rank, in_features), "weight": coefficients, "places": (out_features,)}

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        h = F.linear(x, self.matrix("basis.weight", x.dtype))
        return self._in_order(h[..., self._own_rows], self._times_weight(h, adapter))

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are, the others rounded once."""
        basis = self.matrix("basis.weight")
        return self._rows_in_order(basis[self._own_rows], _product(self.matrix(), basis))

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
    spanning, combining = "weight", "coefficients"
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
        return self._in_order(h, F.linear(h, self.matrix("coefficients", x.dtype)))

    def dense_weight(self) -> Tensor:
        """W (out, in): the kept rows as they are, the others rounded once."""
        kept = self.matrix()
        return self._rows_in_order(kept, _product(self.matrix("coefficients"), kept))


class RoundedLinear(LowRankLinear):
    """A whole linear whose weight is rounded; its rank is 0, which says nothing."""

    @staticmethod
    def shapes(in_features: int, out_features: int, rank: int, **keys: Any) -> Shapes:
        return {"weight": (out_features, in_features)}

    def forward(self, x: Tensor, adapter: Any = None) -> Tensor:
        y = self._times_weight(x, adapter)
        return y if self.bias is None else y.add_(self.bias)

    def dense_weight(self) -> Tensor:
        return self.matrix()


class RoundedEmbedding(nn.Embedding):
    r"""Embeddings in 8 bits: row t is s_t q_t, with q = `weight` (n, d, 1) int8 and s = `weight_scales` (n, 1).

    Only the rows that are looked up are multiplied out.
    """

    weight: Any
    weight_scales: Any

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's, which would make the dense weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = out_features, in_features, None
        _register_embedding(self, out_features, in_features, device, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids, :, 0] * self.weight_scales[ids]

    def dense_weight(self) -> Tensor:
        return self.weight[..., 0] * self.weight_scales

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits=8"


class RoundedHead(nn.Linear):
    """An output head in 8 bits, with the tensors of a :class:`RoundedEmbedding`: that one's own where it is tied."""

    weight: Any
    weight_scales: Any

    def __init__(
        self, in_features: int, out_features: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        _register_embedding(self, out_features, in_features, device, dtype)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        tokens, scales = x.reshape(-1, x.shape[-1]), self.weight_scales[:, 0].to(x.dtype)
        if x.is_cpu and len(tokens) <= FEW and not torch.is_grad_enabled():
            y = torch.ops.aten._weight_int8pack_mm(tokens.contiguous(), self.weight[..., 0], scales)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight[..., 0].to(x.dtype)).mul_(scales)
        return y if self.bias is None else y.add_(self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight[..., 0] * self.weight_scales


def embedding_shapes(n_tokens: int, width: int) -> Shapes:
    """Name and shape of the stored tensors of a :class:`RoundedEmbedding` or :class:`RoundedHead`."""
    return {"weight": (n_tokens, width, 1), f"weight{SCALES}": (n_tokens, 1)}


# The form that a spec in config.json names -> its class. "dense", a smaller nn.Linear or Conv1D, is in no table.
# A new form is a row here, one of PRICES (method/allocation/units.py) and one of LAYOUTS (steps/compression.py).
FORMS: dict[str, type[LowRankLinear]] = {"factors": FactorLinear, "pivot": PivotLinear}


def _register(
    module: nn.Module, name: str, shape: tuple[int, ...], grid: Grid | None, device: Any, dtype: torch.dtype | None
) -> None:
    """A matrix of this shape: a parameter, or the tensors of its integers, which need no gradient."""
    if grid is None:
        module.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        return
    for own, size in packed_shapes(name, shape, grid).items():
        module.register_parameter(own, _constant(size, dtype if own.endswith(SCALES) else torch.uint8, device))


def _register_embedding(module: Any, n_tokens: int, width: int, device: Any, dtype: torch.dtype | None) -> None:
    for name, shape in embedding_shapes(n_tokens, width).items():
        module.register_parameter(name, _constant(shape, torch.int8 if name == "weight" else dtype, device))


def _constant(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def places(order: Tensor) -> Tensor:
    """The inverse permutation, int32: where in `order` each output feature is."""
    return order.long().argsort().int()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or better, rounded once to the dtype of a."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
