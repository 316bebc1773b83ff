"""FactorLinear, PivotLinear and SharedPivotLinear: by hand, against nn.Linear, gradients, dtypes, sharing,
bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drank.method.pivot import pivot_rows, split_group
from drank.model.layers import FactorLinear, PivotLinear, SharedPivotLinear


def factor_linear(n_in=6, n_out=8, rank=3, bias=True, dtype=torch.float64):
    return FactorLinear.from_factors(
        torch.randn(n_out, rank, dtype=dtype),
        torch.randn(rank, n_in, dtype=dtype),
        torch.randn(n_out, dtype=dtype) if bias else None,
    )


def pivot_linear(n_in=6, n_out=8, rank=3, bias=True, dtype=torch.float64):
    return PivotLinear.from_factors(
        torch.randn(rank, n_in, dtype=dtype),
        torch.randn(n_out - rank, rank, dtype=dtype),
        torch.randperm(n_out),
        torch.randn(n_out, dtype=dtype) if bias else None,
    )


def shared_pivot_linear(n_in=6, n_out=8, rank=3, bias=True, dtype=torch.float64, first=1, kept=2):
    first, kept = min(first, rank - 1), min(kept, rank - 1, n_out)
    return SharedPivotLinear.from_factors(
        torch.randn(rank, n_in, dtype=dtype),
        first,
        torch.randn(n_out - kept, rank, dtype=dtype),
        torch.randperm(n_out),
        torch.randn(n_out, dtype=dtype) if bias else None,
    )


def shared_basis(module):
    return module.basis if isinstance(module, FactorLinear) else module.basis.weight


BUILDERS = [factor_linear, pivot_linear, shared_pivot_linear]
ALL = pytest.mark.parametrize("build", BUILDERS)


def test_factors_by_hand():
    module = FactorLinear.from_factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 1]))
    assert module.dense_weight().tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert module(torch.tensor([1.0, 1.0])).tolist() == [7.0, 15.0]


def test_pivot_by_hand_puts_the_kept_row_and_the_others_in_their_places():
    kept, coefficients = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0], [-1.0]])
    module = PivotLinear.from_factors(kept, coefficients, torch.tensor([1, 2, 0]), torch.tensor([0.5, 0.0, 0.0]))
    assert module.dense_weight().tolist() == [[-1.0, -2.0], [1.0, 2.0], [10.0, 20.0]]
    assert module(torch.tensor([[1.0, 1.0]])).tolist() == [[-2.5, 3.0, 30.0]]


def test_two_modules_that_share_a_basis_by_hand():
    # The stack of the two is [2 1 7; 1 0 2; 0 3 9; 0 1 3; 1 -1 -1]: its rows 1 and 3 are the basis.
    basis = nn.Parameter(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]]))
    upper = SharedPivotLinear.from_factors(basis, 0, torch.tensor([[2.0, 1.0]]), torch.tensor([1, 0]))
    lower = SharedPivotLinear.from_factors(
        basis, 1, torch.tensor([[0.0, 3.0], [1.0, -1.0]]), torch.tensor([1, 0, 2]), torch.tensor([0.5, 0.0, 0.0])
    )
    assert upper.dense_weight().tolist() == [[2.0, 1.0, 7.0], [1.0, 0.0, 2.0]]
    assert lower.dense_weight().tolist() == [[0.0, 3.0, 9.0], [0.0, 1.0, 3.0], [1.0, -1.0, -1.0]]
    assert upper(torch.tensor([1.0, 1.0, 1.0])).tolist() == [10.0, 3.0]
    assert lower(torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[12.5, 4.0, -1.0]]
    assert upper.basis.weight is lower.basis.weight is basis


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
    basis = nn.Parameter(form.kept.to(dtype))
    modules = [
        SharedPivotLinear.from_factors(basis, member.first, member.coefficients.to(dtype), member.order)
        for member in split_group(form, out_sizes)
    ]
    x = torch.randn(3, n_in, dtype=torch.float64, generator=generator)
    y = torch.cat([module(x.to(dtype)) for module in modules], dim=-1).double()
    # Rounding the basis and the coefficients reaches an output once for each of the `rank` terms of its sum.
    unit = torch.finfo(dtype).eps * max(1.0, form.max_abs_coefficient) * (x.abs() @ form.kept.abs().T).sum(-1).max()
    torch.testing.assert_close(y, x @ (left @ right).T, rtol=0, atol=float(100 * unit))


@settings(deadline=None)
@given(
    build=st.sampled_from(BUILDERS),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    batch=st.lists(st.integers(0, 3), max_size=3),
    data=st.data(),
)
def test_output_is_that_of_the_dense_linear(build, sizes, bias, batch, data):
    rank = data.draw(st.integers(1, min(sizes)))
    module = build(*sizes, rank, bias)
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(module(x), F.linear(x, module.dense_weight(), module.bias))


@ALL
def test_gradients_are_right(build):
    module = build()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def output(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_weight_of_a_half_precision_module_is_rounded_once(build, dtype):
    module = build(32, 48, 16, dtype=dtype)
    exact = copy.deepcopy(module).double().dense_weight()
    dense = module.dense_weight()
    assert dense.dtype == dtype
    torch.testing.assert_close(dense.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_kept_rows_are_verbatim_in_the_dense_weight():
    module = pivot_linear(dtype=torch.bfloat16)
    assert torch.equal(module.dense_weight()[module.places.argsort()[:3]], module.weight)


def test_kept_rows_of_the_shared_basis_are_verbatim_in_the_dense_weight():
    module = shared_pivot_linear(dtype=torch.bfloat16)
    assert torch.equal(module.dense_weight()[module.places.argsort()[:2]], module.basis.weight[1:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("first", "n_coefficients"), [(0, 5), (3, 5), (1, 3), (0, 2), (0, 3)])
def test_a_module_of_a_group_may_keep_any_slice_of_the_basis(first, n_coefficients, dtype):
    module = SharedPivotLinear.from_factors(
        torch.randn(3, 6, dtype=dtype), first, torch.randn(n_coefficients, 3, dtype=dtype), torch.randperm(5)
    )
    x = torch.randn(2, 6, dtype=dtype)
    assert module.kept == 5 - n_coefficients
    torch.testing.assert_close(module(x), F.linear(x, module.dense_weight()), rtol=0.02, atol=0.05)


def test_a_module_of_a_group_may_have_all_its_rows_in_the_basis():
    module = SharedPivotLinear.from_factors(torch.randn(4, 6), 1, torch.empty(0, 4), torch.tensor([2, 0, 1]))
    x = torch.randn(2, 6)
    assert torch.equal(module.dense_weight()[[2, 0, 1]], module.basis.weight[1:])
    torch.testing.assert_close(module(x), F.linear(x, module.dense_weight()))


@ALL
def test_the_whole_module_moves_to_another_dtype_but_for_the_places(build):
    module = build().to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.int32 for buffer in module.buffers())


@ALL
def test_autocast_gives_the_autocast_dtype(build):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build(dtype=torch.float32)(torch.randn(2, 6)).dtype == torch.bfloat16


@ALL
def test_compiles_to_one_graph(build):
    module = build()
    x = torch.randn(2, 6, dtype=torch.float64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_parameters_are_counted_as_they_are_priced_and_the_index_beside_them():
    factors, pivot = factor_linear(bias=False), pivot_linear(bias=False)
    assert factors.n_parameters == 3 * (8 + 6) == sum(p.numel() for p in factors.parameters())
    assert pivot.n_parameters == 3 * (8 + 6 - 3) == sum(p.numel() for p in pivot.parameters())
    assert pivot.index_bytes == 4 * 8
    shared = shared_pivot_linear(bias=False)
    assert shared.n_parameters == 3 * (8 + 6 - 2) == sum(p.numel() for p in shared.parameters())
    assert shared.index_bytes == 4 * 8
    assert factor_linear(bias=True).n_parameters == factors.n_parameters


def test_a_full_rank_pivot_form_is_the_matrix_with_its_rows_permuted():
    module = pivot_linear(6, 4, 4)
    assert module.n_parameters == 24
    assert torch.equal(module.dense_weight()[module.places.argsort()], module.weight)


@pytest.mark.parametrize(
    "build",
    [
        lambda basis, _: FactorLinear.from_factors(torch.randn(8, 3), basis),
        lambda basis, i: SharedPivotLinear.from_factors(basis, 2 * i, torch.randn(6 + i, 3), torch.arange(8)),
    ],
)
def test_a_basis_that_is_a_parameter_is_shared_not_copied(build):
    basis = nn.Parameter(torch.randn(3, 6))
    both = nn.ModuleList([build(basis, i) for i in range(2)])
    assert shared_basis(both[0]) is shared_basis(both[1]) is basis
    assert len(list(both.parameters())) == 3
    copied = copy.deepcopy(both)
    assert shared_basis(copied[0]) is shared_basis(copied[1]) is not basis


@ALL
def test_description_states_the_sizes(build):
    assert "in_features=6, out_features=8, rank=3, bias=True" in repr(build())


def test_description_of_a_module_of_a_group_states_its_rows_of_the_basis():
    assert "bias=True, first=1, kept=2" in repr(shared_pivot_linear())


@ALL
def test_a_new_module_has_the_shapes_of_one_made_from_factors(build):
    made = build()
    rows = (1, 2) if build is shared_pivot_linear else ()
    new = type(made)(6, 8, 3, *rows, device="meta", dtype=torch.bfloat16)
    assert {k: v.shape for k, v in new.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}
    assert new.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: FactorLinear.from_factors(torch.ones(4, 2), torch.ones(3, 5)),
            r"weight \(4, 2\) times basis \(3, 5\)",
        ),
        (
            lambda: FactorLinear.from_factors(torch.ones(4, 2), torch.ones(2)),
            r"basis \(2,\) is no matrix product",
        ),
        (
            lambda: FactorLinear.from_factors(torch.ones(4, 2), torch.ones(2, 5), torch.ones(5)),
            r"bias has shape \(5,\); a layer with 4 output features needs \(4,\)",
        ),
        (
            lambda: PivotLinear.from_factors(torch.ones(2, 5), torch.ones(3, 1), torch.arange(5)),
            r"coefficients \(3, 1\) times kept \(2, 5\)",
        ),
        (
            lambda: PivotLinear.from_factors(torch.ones(2, 5), torch.ones(3, 2), torch.tensor([0, 1, 2, 3, 3])),
            r"order must hold each of 0 ... 4 once",
        ),
        (
            lambda: PivotLinear.from_factors(torch.ones(2, 5), torch.ones(3, 2), torch.arange(4)),
            r"order must hold each of 0 ... 4 once; it has shape \(4,\)",
        ),
        (
            lambda: SharedPivotLinear.from_factors(torch.ones(2, 5), 0, torch.ones(3, 1), torch.arange(5)),
            r"coefficients \(3, 1\) times basis \(2, 5\)",
        ),
        (
            lambda: SharedPivotLinear.from_factors(torch.ones(2, 5), 0, torch.ones(1, 2), torch.tensor([0, 2])),
            r"order must hold each of 0 ... 1 once; it has shape \(2,\)",
        ),
        (
            lambda: SharedPivotLinear.from_factors(torch.ones(2, 5), 1, torch.ones(3, 2), torch.arange(5)),
            "first is 1, and 5 .* less 3 rows of coefficients leave 2 kept rows: .* slice of the 2 rows of the basis",
        ),
        (
            lambda: SharedPivotLinear.from_factors(torch.ones(2, 5), -1, torch.ones(4, 2), torch.arange(5)),
            "first is -1",
        ),
        (
            lambda: SharedPivotLinear.from_factors(torch.ones(2, 5), 0, torch.ones(6, 2), torch.arange(5)),
            "less 6 rows of coefficients leave -1 kept rows",
        ),
        (
            lambda: SharedPivotLinear.from_factors(
                torch.ones(2, 5), 0, torch.ones(3, 2), torch.arange(5), torch.ones(4)
            ),
            r"bias has shape \(4,\); a layer with 5 output features needs \(5,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
