"""benchmarks/gpu.py runs alone, on a CPU too, and does what drank does. No times are asserted."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmarks import gpu
from torch.utils.flop_counter import FlopCounterMode

from drank.method import pivot
from drank.method.covariance import SecondMoment
from drank.method.spectrum import factors, whitened_spectrum

SCRIPT = Path(gpu.__file__)
SHAPE = gpu.TINY[1]  # grouped heads


@pytest.fixture
def asked():
    return gpu.arguments(["--device", "cpu", "--tiny"])


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch):
    monkeypatch.setattr(gpu, "PANEL", 24)
    monkeypatch.setattr("gc.collect", int)  # slow where many tests have left much


def test_whole_script_alone_with_plain_torch(tmp_path, monkeypatch, capsys):
    for name in ("drank", "benchmarks", "transformers", "jaxtyping", "numpy", "scipy"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--json", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(shutil.copy(SCRIPT, tmp_path), run_name="__main__")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"product", "compression", "layer", "inference"}
    assert {row["model"] for row in rows if row["part"] == "inference"} == {"tiny Llama-2", "tiny Llama-3"}
    without = [row["case"] for row in rows if row["seconds"] is None]
    assert all("loss at 0.8" in case for case in without)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + len(rows)
    assert {line.count("|") for line in printed} == {9}


@pytest.mark.parametrize("form", ["index_copy", "gather"])
@pytest.mark.parametrize("leading", [(1,), (5,), (2, 3)])
def test_pivot_forms_are_their_matrix(form, leading, asked):
    given = gpu.tensors(form, 96, 64, 0.5, asked)
    K, C, order, _ = (t.double() if t.is_floating_point() else t for t in given)
    W = torch.empty(96, 64, dtype=torch.float64)
    W[order] = torch.cat([K, C @ K])
    x = torch.randn(*leading, 64)
    y = gpu.FORMS[form](x.double(), K, C, order, order.argsort())
    torch.testing.assert_close(y, x.double() @ W.T)
    gpu.check(form, x.bfloat16(), given)


def llama_layer(shape):
    """transformers' decoder layer in float64, norms of ones, and its weights by our names."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, rms_norm_eps=1e-5, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).double().eval()
    named = {name.rpartition(".")[2].removesuffix("_proj"): module for name, module in layer.named_modules()}
    return layer, {name: named[name].weight.detach() for name in shape.linears}


@pytest.mark.parametrize("shape", gpu.TINY, ids=lambda s: s.name)
@torch.no_grad()
def test_block_is_the_block_of_transformers(shape):
    layer, weights = llama_layer(shape)
    x = torch.randn(2, 7, shape.hidden, dtype=torch.float64)
    rotary = gpu.rotary_of(shape, torch.arange(7)).double()
    expected = layer(x, position_embeddings=(rotary[0][None], rotary[1][None]))
    ours = gpu.block(x, lambda name, h: F.linear(h, weights[name]), shape, rotary)
    torch.testing.assert_close(ours, expected[0] if isinstance(expected, tuple) else expected)
    assert {name: tuple(w.shape) for name, w in weights.items()} == shape.linears


@pytest.mark.parametrize("shape", gpu.TINY, ids=lambda s: s.name)
@torch.no_grad()
def test_decoding_with_the_cache_continues_the_prefill(shape):
    weights = {name: torch.randn(sides).double() / 8 for name, sides in shape.linears.items()}
    x, positions = torch.randn(2, 6, shape.hidden, dtype=torch.float64), torch.arange(6)

    def run(part, kv):
        rotary = gpu.rotary_of(shape, positions[part]).double()
        return gpu.block(x[:, part], lambda name, h: F.linear(h, weights[name]), shape, rotary, kv)

    cache = [torch.zeros(2, shape.kv_heads, 6, shape.head_size, dtype=torch.float64) for _ in range(2)]
    run(slice(0, 5), (*cache, positions[:5]))
    last = run(slice(5, 6), (*cache, positions[5:]))
    torch.testing.assert_close(last, run(slice(0, 6), None)[:, 5:])


def test_second_moments_are_those_of_drank():
    x, moment, total = torch.randn(2, 3, 50, 60).bfloat16(), SecondMoment(60), torch.zeros(60, 60)
    for batch in x:
        moment.add(batch.flatten(0, 1))
        gpu.add_moment(total, batch)
    torch.testing.assert_close(total.triu(), moment.mean().triu() * 300, rtol=1e-6, atol=1e-4)


def test_calibration_sees_all_inputs_and_gradients(asked):
    calibration = gpu.Calibration(SHAPE, asked)
    sums, x = calibration.forward(), calibration.inputs.clone()
    outputs, seen = calibration.outputs.clone(), {}

    def linear(name, h):
        seen[name] = h, F.linear(h, calibration.layer[name])
        return seen[name][1]

    y = gpu.block(x.requires_grad_(True), linear, SHAPE, calibration.rotary)
    torch.testing.assert_close(y, outputs)
    assert set(sums) == {"q", "o", "gate", "down"}
    for name, total in sums.items():
        rows = seen[name][0].flatten(0, 1).double()
        torch.testing.assert_close(total.triu().double(), (rows.T @ rows).triu(), rtol=1e-5, atol=1e-4)
    names = list(SHAPE.linears)
    *gradients, of_input = torch.autograd.grad(y, [*(seen[name][1] for name in names), x], outputs)
    sums = calibration.backward()
    assert list(sums) == names
    for name, g in zip(names, gradients, strict=True):
        rows = g.flatten(0, 1).double()
        total = sums[name].triu().double()
        torch.testing.assert_close(total, (rows.T @ rows).triu(), rtol=2e-2, atol=2e-2 * float(total.abs().max()))
    torch.testing.assert_close(calibration.outputs, of_input, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_flops_are_those_that_torch_counts(stage, asked):
    calibration = gpu.Calibration(SHAPE, asked)
    with FlopCounterMode(display=False) as counter:
        getattr(calibration, stage)()
    products = counter.get_flop_counts()["Global"]
    attention = 2 * SHAPE.hidden * asked.window_length * (1 if stage == "forward" else 3.5)
    counted = products[torch.ops.aten.mm]
    assert calibration.flops(stage) - asked.windows * asked.window_length * attention == counted


def metrics(out, n, kfac):
    x, g = torch.randn(40, n).double(), torch.randn(40, out).double()
    return x.T @ x / 40, g.T @ g / 40 if kfac else None


@pytest.mark.parametrize(("out", "n"), [(12, 12), (7, 12), (12, 7)])
@pytest.mark.parametrize("kfac", [False, True])
def test_spectrum_is_that_of_drank(out, n, kfac, monkeypatch):
    W, (H, G) = torch.randn(out, n).double(), metrics(out, n, kfac)
    with FlopCounterMode(display=False) as counter:
        energies, left, right = gpu.spectrum(W, H, G)
    ours = whitened_spectrum(W, H, G)
    torch.testing.assert_close(energies.sqrt(), ours.singular_values, rtol=1e-6, atol=1e-6 * float(energies[0]) ** 0.5)
    for k in (1, 4):
        our_left, our_right = factors(W, **ours.rows(k))
        torch.testing.assert_close((left[:k].T @ right[:k]).float(), our_left @ our_right, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(gpu, "EIGH", 0)
    assert gpu.spectrum_flops(out, n, kfac) == counter.get_total_flops()


@pytest.mark.parametrize(("out", "r", "n"), [(9, 4, 6), (5, 5, 7), (40, 16, 12)])
def test_pivot_rows_say_what_the_factors_say(out, r, n):
    left, right = torch.randn(out, r).double(), torch.randn(r, n).double()
    K, C, order = gpu.pivot_rows(left, right)
    W = left @ right
    assert sorted(order.tolist()) == list(range(out))
    torch.testing.assert_close(K, W[order[:r]])
    torch.testing.assert_close(C @ K, W[order[r:]])
    form = pivot.pivot_rows(left, right)
    assert (K.shape, C.shape) == (form.kept.shape, form.coefficients.shape)


def test_head_gradients_have_the_covariance_of_the_fisher_matrix(asked):
    """Where the head is the identity's multiple and the norm does nothing, E[g gᵀ] = diag(p) - p pᵀ."""
    shape = gpu.Shape("uniform", 1, 4, 8, 2, 2, 4)
    asked.windows, asked.window_length, asked.batch_windows = 200, 100, 50
    calibration = gpu.Calibration(shape, asked)
    calibration.inputs.zero_().add_(1)
    calibration.head(torch.eye(4).bfloat16(), 200)
    g = calibration.outputs.float().flatten(0, 1)
    # p is uniform; the norm of (1, 1, 1, 1) passes on what is orthogonal to it, as all these gradients are.
    torch.testing.assert_close(g.T @ g / len(g), torch.eye(4) / 4 - 1 / 16, atol=6e-3, rtol=0)
