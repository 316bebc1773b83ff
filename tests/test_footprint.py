"""The worked table of memory, disk and time, against small models that run, and against what stages write."""

import shutil
from dataclasses import replace

import pytest
import torch
from benchmarks import footprint as tables
from benchmarks import gpu
from benchmarks.covariance_overhead import collect
from safetensors import safe_open
from safetensors.torch import save_file
from stages import covariance
from stages.spectrum import main as spectrum_stage
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from drank.method.channels import remove_channels
from drank.method.covariance import SecondMoment
from drank.model.capture import (
    Batch,
    run_batches,
    send_back,
    split_windows,
    watching_inputs,
    watching_output_gradients,
)
from drank.model.groups import find_mlps
from drank.model.layers import PivotLinear
from drank.model.linears import find_linears, shared_inputs
from drank.model.offload import sweeps
from drank.planning import footprint
from drank.planning.footprint import Setting, Shape, spectrum_flops
from drank.project.files import TensorFolder
from drank.project.params import Spectrum
from drank.steps import spectrum
from tests import tiny

SHAPE = Shape("tiny", 2, 32, 64, 4, 2, 320)  # tests.tiny.llama
SHAPES = [SHAPE, Shape("all heads", 3, 64, 176, 4, 4, 96)]
SETTING = Setting(n_windows=6, window_length=16, batch_windows=2, cuts=(0.0, 0.25, 0.5))


def llama(shape):
    return tiny.llama(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=False,
    ).to(torch.bfloat16)  # fmt: skip


def windows(setting, vocabulary):
    size = (setting.n_windows, setting.window_length)
    return torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))


def n_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_parameters_and_linears_are_those_of_transformers(shape):
    model = llama(shape)
    assert n_bytes(model.parameters()) == 2 * footprint.model_parameters(shape)
    assert n_bytes(model.model.layers[0].parameters()) == 2 * footprint.block_parameters(shape)
    found = [(x.out_features, x.in_features) for x in find_linears(model, ["re:.*"])]
    assert found == list(shape.linears.values()) * shape.n_layers
    billions = [footprint.model_parameters(shape) / 1e9 for shape in tables.MODELS]
    assert billions == pytest.approx([6.738, 13.016, 68.977], abs=1e-3)  # of the checkpoints of Llama 2


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_sums_are_those_that_a_pass_holds(shape):
    model, ids = llama(shape), windows(SETTING, shape.vocabulary)
    linears = find_linears(model, ["re:.*"])
    owners = shared_inputs(model, linears, ids[:1])
    for moments, sides, magnitudes in zip(
        collect(model, ids, linears, owners, "empirical"),
        (footprint.input_sides(shape), footprint.output_sides(shape)),
        (True, False),
        strict=True,
    ):
        held = n_bytes(t for m in moments.values() for t in (m.total, m.magnitude) if t is not None)
        assert held == shape.n_layers * footprint.moments(sides, magnitudes)


# Peaks: of batches so large that what does not grow with tokens is small beside it.
WIDE = [Shape("all heads", 1, 128, 344, 4, 4, 512), Shape("grouped heads", 1, 128, 448, 4, 2, 512)]
TOKENS = (4, 256)


def layer_of(shape):
    model = llama(shape).requires_grad_(False)
    x = torch.randn(*TOKENS, shape.hidden).bfloat16()
    rotary = model.model.rotary_emb(x, torch.arange(TOKENS[1])[None])
    layer = model.model.layers[0]
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    return layer, linears, x, rotary


def peak(run):
    """Bytes that run has allocated at most at once."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = highest = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


@pytest.mark.parametrize("shape", WIDE, ids=lambda s: s.name)
def test_graph_is_what_autograd_saves(shape):
    layer, _, x, rotary = layer_of(shape)
    given = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *rotary)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_(True), position_embeddings=rotary)
    assert y.requires_grad
    assert sum(saved.values()) == footprint.passes(shape, x.shape[0] * x.shape[1])["graph"]


@pytest.mark.parametrize("shape", WIDE, ids=lambda s: s.name)
def test_peaks_of_watched_passes(shape):
    layer, linears, x, rotary = layer_of(shape)
    tokens = x.shape[0] * x.shape[1]
    inputs = {name: SecondMoment(m.in_features) for name, m in linears.items() if name[10] not in "kv"}
    gradients = {name: SecondMoment(m.out_features, magnitudes=False) for name, m in linears.items()}

    @torch.inference_mode()
    def forward():
        with watching_inputs({name: linears[name] for name in inputs}, lambda name, h: inputs[name].add(h)):
            layer(x, position_embeddings=rotary)

    def backward():
        given = x.clone().requires_grad_(True)
        with watching_output_gradients(linears, lambda name, g: gradients[name].add(g)):
            layer(given, position_embeddings=rotary).backward(torch.ones_like(x))

    assert peak(forward) == pytest.approx(footprint.passes(shape, tokens)["forward"], rel=0.1)
    assert peak(backward) == pytest.approx(footprint.passes(shape, tokens)["backward"], rel=0.1)


def test_peak_of_the_head():
    n, length, vocabulary = 4, 64, 2000
    hidden, head = torch.randn(n, length, 8).bfloat16(), torch.randn(vocabulary, 8).bfloat16()

    def run():
        logits = torch.nn.functional.linear(hidden.clone().requires_grad_(True), head)
        send_back(logits, Batch(0, torch.zeros(n, length, dtype=torch.long)), "gaussian")

    shape = replace(SHAPE, vocabulary=vocabulary)
    assert peak(run) == pytest.approx(footprint.passes(shape, n * length)["head"], rel=0.1)


def calibrated(root, linears):
    """Covariances of random rows, one file a linear."""
    for folder, side in (("inputs", "in_features"), ("gradients", "out_features")):
        (root / folder).mkdir()
        for linear in linears:
            n = getattr(linear, side)
            x = torch.randn(2 * n, n)
            tensors = {"covariance": x.T @ x / n, "magnitude": torch.ones(n)}
            save_file(tensors, root / folder / f"{linear.name}.safetensors")
    return root


@pytest.mark.parametrize("shape", [Shape("7B", 1, 192, 516, 4, 4, 64), Shape("70B", 1, 192, 672, 8, 1, 64)])
@pytest.mark.parametrize("metric", ["input", "kfac"])
def test_peak_of_spectra(shape, metric, tmp_path):
    model = llama(shape)
    linears = find_linears(model, ["re:.*"])
    units = "block" if metric == "kfac" else "matrix"
    asked = {"calibration_seed": 0, "metric": metric, "damping": 1e-4}
    asked = Spectrum(units=units, **asked | ({"cuts": Setting.cuts} if units == "block" else {}))
    described = {"owners": {linear.name: linear.name for linear in linears}}
    covariances = TensorFolder(calibrated(tmp_path, linears))
    work = spectrum._Work(asked, covariances, described, "cpu", TensorFolder(tmp_path))
    # Metrics are made anew each time: those of inputs are kept.
    single = max(peak(lambda down=down: work.unit((down,), work.metrics())) for down in linears[-3:])
    assert single == pytest.approx(footprint.spectrum_memory(shape, False)["unit"], rel=0.15)
    if units == "block":
        (mlp,) = find_mlps(model, linears)
        block = peak(lambda: work.block(mlp, work.metrics()))
        assert block == pytest.approx(footprint.spectrum_memory(shape, True)["unit"], rel=0.15)


@pytest.mark.parametrize("kfac", [False, True])
def test_offloaded_memory_knows_neither_depth_nor_windows(kfac):
    shape = tables.MODELS[0]
    bounded = footprint.memory(shape, Setting(), kfac, offload=True)
    deep = footprint.memory(replace(shape, n_layers=96), Setting(n_windows=9999), kfac, offload=True)
    assert bounded == deep
    whole = footprint.memory(shape, Setting(), kfac, offload=False)
    assert all(bounded[part] <= whole[part] for part in whole)


@pytest.mark.parametrize("fisher", ["none", "gaussian"])
def test_hidden_states_are_what_an_offloaded_run_stores(fisher):
    class Store(dict):
        highest = 0

        def __setitem__(self, name, tensor):
            super().__setitem__(name, tensor)
            self.highest = max(self.highest, n_bytes(kept["states"] for kept in self.values()))

    model, store = llama(SHAPE), Store()
    batches = split_windows(windows(SETTING, SHAPE.vocabulary), SETTING.batch_windows)
    for sweep in sweeps(model, find_linears(model, ["re:.*"]), batches, fisher, 0, store):
        for _ in sweep.passes:
            pass
    assert store.highest == footprint.hidden_states(SHAPE, SETTING, fisher != "none")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny project whose covariance and spectrum stages ran."""
    root = tmp_path_factory.mktemp("footprint")
    tiny.project(root)
    shutil.copytree(root / "source/model", root / "data/raw/model")
    (root / "data/sampling/calibration").mkdir(parents=True)
    save_file({"windows": windows(SETTING, 320)}, root / "data/sampling/calibration/0.safetensors")
    covariance.main("0", root)
    for key in ("input", "kfac"):
        spectrum_stage(key, root)
    return root / "data"


def tensor_bytes(folder):
    def sizes(path):
        with safe_open(path, "pt") as file:
            return n_bytes(file.get_tensor(name) for name in file.keys())  # noqa: SIM118  it is no dict

    return sum(sizes(path) for path in folder.rglob("*.safetensors"))


def test_files_are_those_of_the_stages(written):
    for sub, kfac in (("inputs", False), ("", True)):
        assert tensor_bytes(written / f"covariance/0/{sub}") == footprint.covariance_files(SHAPE, kfac)
    for key, blocks in (("input", False), ("kfac", True)):
        # Where the calibration is short of tokens, components are dropped: less is written than at full rank.
        full = footprint.spectrum_files(SHAPE, SETTING, blocks)
        assert 0.8 * full < tensor_bytes(written / "spectrum" / key) <= full
    files = len(list((written / "spectrum/kfac/factors").iterdir()))
    assert files == len(list(footprint.spectra_units(SHAPE, SETTING, blocks=True)))


def test_compressed_folder_by_modules():
    whole = footprint.compressed_folder(SHAPE, 1.0, pivot=False)
    assert whole == n_bytes(llama(SHAPE).parameters())
    ranks = {"q": 20, "k": 9, "v": 9, "o": 20, "gate": 25, "up": 25, "down": 25}
    made = [PivotLinear(n, out, ranks[name], False, in_order=False) for name, (out, n) in SHAPE.linears.items()]
    layers = [(sum(p.numel() for p in layer.parameters()), layer.places.nbytes) for layer in made]
    size = sum(parameters for parameters, _ in layers) / SHAPE.n_parameters
    kept = SHAPE.n_layers * sum(2 * parameters + index for parameters, index in layers)
    dense = SHAPE.n_layers * 2 * SHAPE.n_parameters
    assert footprint.compressed_folder(SHAPE, size, pivot=True) == whole - dense + kept


def test_flops_of_passes_are_those_that_torch_counts():
    model, ids = llama(SHAPE), windows(SETTING, SHAPE.vocabulary)
    with FlopCounterMode(display=False) as counter:
        for _ in run_batches(model, split_windows(ids, SETTING.batch_windows), "gaussian"):
            pass
    attention = SHAPE.n_layers * 2 * SHAPE.hidden * SETTING.window_length
    sums = SHAPE.n_layers * sum(
        footprint.moment_flops(d) for d in footprint.input_sides(SHAPE) + footprint.output_sides(SHAPE)
    )
    passes = footprint.covariance_flops(SHAPE, SETTING, kfac=True, offload=False) / SETTING.tokens
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / SETTING.tokens
    assert passes - sums - 3.5 * attention == counted
    again = footprint.covariance_flops(SHAPE, SETTING, kfac=True, offload=True) / SETTING.tokens
    assert again - passes == attention + SHAPE.n_layers * 2 * SHAPE.n_parameters


def test_flops_of_a_sum_by_hand():
    assert footprint.moment_flops(300) == 2 * (128 * 300 + 128 * 172 + 44 * 44)


@pytest.mark.parametrize(("out", "n"), [(12, 12), (5, 12), (12, 5)])
def test_flops_of_spectra_agree_with_the_other_benchmark(out, n):
    assert [spectrum_flops(out, n, kfac) for kfac in (False, True)] == [
        gpu.spectrum_flops(out, n, kfac) for kfac in (False, True)
    ]


def test_flops_of_removing_channels_are_about_those_that_torch_counts():
    shape, setting = replace(SHAPE, hidden=24, mlp=240), SETTING
    x, g = torch.randn(400, 240), torch.randn(400, 24)
    with FlopCounterMode(display=False) as counter:
        remove_channels(torch.randn(24, 240), x.T @ x, g.T @ g, footprint.cut_sizes(shape, setting), at_once=8)
    uncounted = 2 * 240**3 + footprint.EIGH * 24**3 - 2 * 400 * (240**2 + 24**2)  # inverse, eigenproblem; our xᵀ x
    assert footprint.channel_flops(shape, setting) - uncounted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_of_pivot_rows_by_hand(monkeypatch):
    monkeypatch.setattr(footprint, "pivot_rank", lambda out, n, _size: min(out, n))
    square = Shape("square", 1, 6, 6, 1, 1, 8)  # LU of a square matrix takes 2/3 n³; there is no other row to express
    assert footprint.pivot_flops(square, 1.0) == pytest.approx(7 * (2 / 3 + 2) * 6**3)


def test_tables(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["footprint", "--bf16", "500000", "--float64", "40000"])
    tables.main()
    hours = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 7B | input |")][-1]
    expected = footprint.covariance_flops(tables.MODELS[0], Setting(), False, False) / 5e14 / 3600
    assert float(hours.split("|")[3]) == pytest.approx(expected, rel=1e-2)
