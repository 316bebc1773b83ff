"""Numerics stay on the device of what they are given. Here every call that forgets it makes a tensor on meta, which
cannot be mixed with those given; the results are those of a plain run."""

import contextlib

import pytest
import torch

import tests.tiny as tiny
from drank.method.channels import remove_channels
from drank.method.covariance import SecondMoment
from drank.method.metrics import damped
from drank.method.pivot import pivot_rows
from drank.method.spectrum import factors, whitened_spectrum
from drank.model.capture import run_batches, split_windows, watching_inputs, watching_output_gradients
from drank.project.processes import ProcessError, process_group

FORGOTTEN = [contextlib.nullcontext(), torch.device("meta")]


def both(run):
    plain, strict = ([], [])
    for found, context in zip((plain, strict), FORGOTTEN, strict=True):
        with context:
            found.extend(run())
    assert plain
    for a, b in zip(plain, strict, strict=True):
        assert b.device.type == "cpu"
        assert torch.equal(a, b)


def positive(n, seed=0):
    x = torch.randn(3 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return x.T @ x / len(x)


def weight(n_out, n_in):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(1), device="cpu")


def test_spectra_and_pivot_rows():
    def run():
        W = weight(12, 8)
        spectrum = whitened_spectrum(W, damped(positive(8), 1e-3), damped(positive(12), 1e-3))
        yield from (spectrum.singular_values, *spectrum.rows().values())
        form = pivot_rows(*factors(W, **spectrum.rows(5)))
        yield from (form.kept, form.coefficients, form.order)

    both(run)


def test_removal_of_channels():
    def run():
        for cut in remove_channels(weight(8, 12), positive(12), positive(8), [12, 9, 4], at_once=2):
            yield from (cut.alive, cut.down)

    both(run)


@pytest.mark.parametrize("fisher", ["none", "empirical", "sampled", "gaussian"])
def test_covariances(fisher):
    model, ids = tiny.llama().bfloat16().eval(), torch.arange(32, device="cpu").reshape(4, 8)
    name = "model.layers.0.self_attn.q_proj"
    q_proj = {name: model.get_submodule(name)}

    def run():
        inputs, gradients = (SecondMoment(q_proj[name].weight.shape[side], device="cpu") for side in (1, 0))
        with (
            watching_inputs(q_proj, lambda _name, x: inputs.add(x)),
            watching_output_gradients(q_proj, lambda _name, g: gradients.add(g)),
        ):
            assert sum(run_batches(model, split_windows(ids, 2), fisher)) == 4
        yield from (inputs.mean(), inputs.mean_magnitude())
        if fisher != "none":
            yield gradients.mean()

    both(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ProcessError, match="device is cuda, but torch .* finds no GPU"), process_group(1, "cuda"):
        pass
