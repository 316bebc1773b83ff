"""FactorLinear and PivotLinear: by hand, against nn.Linear, gradients, dtypes, sharing, bad input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from drank.language_model.modules import FactorLinear, PivotLinear


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


BOTH = pytest.mark.parametrize("build", [factor_linear, pivot_linear])


def test_factors_by_hand():
    module = FactorLinear.from_factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 1]))
    assert module.dense_weight().tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert module(torch.tensor([1.0, 1.0])).tolist() == [7.0, 15.0]


def test_pivot_by_hand_puts_the_kept_row_and_the_others_in_their_places():
    kept, coefficients = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0], [-1.0]])
    module = PivotLinear.from_factors(kept, coefficients, torch.tensor([1, 2, 0]), torch.tensor([0.5, 0.0, 0.0]))
    assert module.dense_weight().tolist() == [[-1.0, -2.0], [1.0, 2.0], [10.0, 20.0]]
    assert module(torch.tensor([[1.0, 1.0]])).tolist() == [[-2.5, 3.0, 30.0]]


@settings(deadline=None)
@given(
    build=st.sampled_from([factor_linear, pivot_linear]),
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


@BOTH
def test_gradients_are_right(build):
    module = build()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def output(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_weight_of_a_half_precision_module_is_rounded_once(build, dtype):
    module = build(32, 48, 16, dtype=dtype)
    exact = copy.deepcopy(module).double().dense_weight()
    dense = module.dense_weight()
    assert dense.dtype == dtype
    torch.testing.assert_close(dense.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_kept_rows_are_verbatim_in_the_dense_weight():
    module = pivot_linear(dtype=torch.bfloat16)
    assert torch.equal(module.dense_weight()[module.order[:3].long()], module.weight)


@BOTH
def test_the_whole_module_moves_to_another_dtype_but_for_the_order(build):
    module = build().to(torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.int32 for buffer in module.buffers())


@BOTH
def test_autocast_gives_the_autocast_dtype(build):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert build(dtype=torch.float32)(torch.randn(2, 6)).dtype == torch.bfloat16


@BOTH
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
    assert factor_linear(bias=True).n_parameters == factors.n_parameters


def test_a_full_rank_pivot_form_is_the_matrix_with_its_rows_permuted():
    module = pivot_linear(6, 4, 4)
    assert module.n_parameters == 24
    assert torch.equal(module.dense_weight()[module.order.long()], module.weight)


def test_a_basis_that_is_a_parameter_is_shared_not_copied():
    basis = nn.Parameter(torch.randn(3, 6))
    both = nn.ModuleList([FactorLinear.from_factors(torch.randn(8, 3), basis) for _ in range(2)])
    assert both[0].basis is both[1].basis is basis
    assert len(list(both.parameters())) == 3
    copied = copy.deepcopy(both)
    assert copied[0].basis is copied[1].basis is not basis


@BOTH
def test_description_states_the_sizes(build):
    assert "in_features=6, out_features=8, rank=3, bias=True" in repr(build())


@BOTH
def test_a_new_module_has_the_shapes_of_one_made_from_factors(build):
    made = build()
    new = type(made)(6, 8, 3, device="meta", dtype=torch.bfloat16)
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
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
