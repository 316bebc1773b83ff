"""FactorLinear, PivotLinear and SharedPivotLinear: by hand, against nn.Linear, gradients, dtypes, sharing."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drank.method.allocation.units import PRICES
from drank.method.pivot import pivot_rows, split_group
from drank.model.format import Spec
from drank.model.forms import stored_shapes
from drank.model.layers import FORMS, FactorLinear, PivotLinear, SharedPivotLinear, places
from tests.compressed import filled, randomise

FACTORS, PIVOT, IN_ORDER, SHARED = KINDS = [
    FactorLinear,
    partial(PivotLinear, in_order=False),
    partial(PivotLinear, in_order=True),
    partial(SharedPivotLinear, first=1, kept=2),
]
ALL = pytest.mark.parametrize("kind", KINDS, ids=["factors", "pivot", "in order", "shared"])


def layer(kind, n_in=6, n_out=8, rank=3, bias=True, dtype=torch.float64):
    return randomise(kind(n_in, n_out, rank, bias, dtype=dtype))


def test_factors_by_hand():
    tensors = {"weight": [[1.0], [2.0]], "basis": [[3.0, 4.0]], "bias": [0.0, 1.0]}
    module = filled(FactorLinear, {name: torch.tensor(rows) for name, rows in tensors.items()})
    assert module.dense_weight().tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert module(torch.tensor([1.0, 1.0])).tolist() == [7.0, 15.0]


def test_pivot_by_hand_puts_the_kept_row_and_the_others_in_their_places():
    tensors = {"weight": [[1.0, 2.0]], "coefficients": [[10.0], [-1.0]], "bias": [0.5, 0.0, 0.0], "places": [2, 0, 1]}
    module = filled(PivotLinear, {name: torch.tensor(rows) for name, rows in tensors.items()}, in_order=False)
    assert module.dense_weight().tolist() == [[-1.0, -2.0], [1.0, 2.0], [10.0, 20.0]]
    assert module(torch.tensor([[1.0, 1.0]])).tolist() == [[-2.5, 3.0, 30.0]]


def test_two_modules_that_share_a_basis_by_hand():
    # The stack of the two is [2 1 7; 1 0 2; 0 3 9; 0 1 3; 1 -1 -1]: its rows 1 and 3 are the basis.
    basis = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]]))
    tensors = {"basis.weight": basis, "weight": torch.tensor([[2.0, 1.0]]), "places": torch.tensor([1, 0])}
    upper = filled(SharedPivotLinear, tensors, first=0, kept=1)
    tensors = {"weight": torch.tensor([[0.0, 3.0], [1.0, -1.0]]), "places": torch.tensor([1, 0, 2])}
    bias = torch.tensor([0.5, 0.0, 0.0])
    lower = filled(SharedPivotLinear, {"basis.weight": basis, "bias": bias, **tensors}, first=1, kept=1)
    assert upper.dense_weight().tolist() == [[2.0, 1.0, 7.0], [1.0, 0.0, 2.0]]
    assert lower.dense_weight().tolist() == [[0.0, 3.0, 9.0], [0.0, 1.0, 3.0], [1.0, -1.0, -1.0]]
    assert upper(torch.tensor([1.0, 1.0, 1.0])).tolist() == [10.0, 3.0]
    assert lower(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[12.5, 4.0, -1.0]]
    assert upper.basis.weight is lower.basis.weight is basis
    copied = copy.deepcopy(nn.ModuleList([upper, lower]))
    assert copied[0].basis.weight is copied[1].basis.weight is not basis


@settings(deadline=None)
@given(
    out_sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    n_in=st.integers(1, 16),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_a_group_gives_the_products_with_the_blocks_of_the_stack(out_sizes, n_in, dtype, seed, data):
    rank = data.draw(st.integers(1, min(sum(out_sizes), n_in)))
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(sum(out_sizes), rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, n_in, dtype=torch.float64, generator=generator)
    form = pivot_rows(left, right)
    modules = []
    for member in split_group(form, out_sizes):
        tensors = {"basis.weight": form.kept.to(dtype), "weight": member.coefficients.to(dtype)}
        kept = len(member.order) - len(member.coefficients)
        tensors["places"] = places(member.order)
        modules.append(filled(SharedPivotLinear, tensors, first=member.first, kept=kept))
    x = torch.randn(3, n_in, dtype=torch.float64, generator=generator)
    y = torch.cat([module(x.to(dtype)) for module in modules], dim=-1).double()
    # Rounding the basis and the coefficients reaches an output once for each of the `rank` terms of its sum.
    unit = torch.finfo(dtype).eps * max(1.0, form.max_abs_coefficient) * (x.abs() @ form.kept.abs().T).sum(-1).max()
    torch.testing.assert_close(y, x @ (left @ right).T, rtol=0, atol=float(100 * unit))


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    bias=st.booleans(),
    batch=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(),
)
def test_output_is_that_of_the_dense_linear(kind, sizes, bias, batch, data):
    rank = data.draw(st.integers(3, min(sizes)))
    module = layer(kind, *sizes, rank, bias)
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(module(x), F.linear(x, module.dense_weight(), module.bias))


@ALL
def test_gradients_are_right(kind):
    module = layer(kind)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def output(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_weight_of_a_half_precision_module_is_rounded_once(kind, dtype):
    module = layer(kind, 32, 48, 16, dtype=dtype)
    exact = copy.deepcopy(module).double().dense_weight()
    dense = module.dense_weight()
    assert dense.dtype == dtype
    torch.testing.assert_close(dense.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@ALL
def test_a_module_moves_to_another_dtype_but_for_the_places_and_autocasts(kind):
    module = layer(kind, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 6)).dtype == torch.bfloat16
    module.to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.int32 for buffer in module.buffers())


@pytest.mark.parametrize("kind", [FACTORS, IN_ORDER, SHARED], ids=["factors", "in order", "shared"])
def test_compiles_to_one_graph(kind):
    module = layer(kind)
    x = torch.randn(2, 6, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_every_storage_has_a_price_which_is_what_its_tensors_hold():
    assert FORMS.keys() == PRICES.keys()
    for form, price in PRICES.items():
        keys = {"form": form, "out_features": 8, "in_features": 6, "rank": 3}
        alone = {"a": Spec(**keys)}
        group = {"a": Spec(**keys, basis="a", first=0, kept=1), "b": Spec(**keys, basis="a", first=1, kept=2)}
        for specs in (alone, group):
            numbers = [
                torch.Size(shape).numel() for name, shape in stored_shapes(specs).items() if "places" not in name
            ]
            assert sum(numbers) == price(8 * len(specs), 6, 3)
