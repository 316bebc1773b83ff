"""Small matrices side by side: the results of one thread, in order."""

import pytest
import torch

from drank.method.threads import SMALL, side_by_side


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_results_are_those_of_one_thread_in_order_and_without_gradients():
    weights = [torch.rand(40, 40, dtype=torch.float64, requires_grad=True) for _ in range(20)]
    found = list(side_by_side(lambda W: (torch.get_num_threads(), torch.linalg.eigh(W + W.T)), weights, 40))
    torch.set_num_threads(1)
    for (n_threads, (values, vectors)), W in zip(found, weights, strict=True):
        expected = torch.linalg.eigh(W.detach() + W.detach().T)
        assert n_threads == 1
        assert not values.requires_grad
        assert torch.equal(values, expected[0])
        assert torch.equal(vectors, expected[1])
    torch.set_num_threads(3)


def test_large_matrices_come_one_after_the_other_in_all_threads():
    begun = []
    found = side_by_side(lambda i: begun.append(i) or torch.get_num_threads(), range(3), SMALL + 1)
    assert next(found) == 3
    assert begun == [0]
    assert list(found) == [3, 3]


@pytest.mark.parametrize("width", [SMALL, SMALL + 1])
def test_an_item_that_fails_ends_all_of_it(width):
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda i: 1 // i, [1, 0, *range(1, 100)], width))
