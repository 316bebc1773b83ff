"""Passes are computed in a type that the processor is fast in: by facts, in every stage, and recorded."""

import functools
import logging
import operator
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stages import allocation, compression, covariance, evaluation, spectrum
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drank.audit.folder import Folder
from drank.audit.rebuilt import check_rebuilt
from drank.model import precision
from drank.model.precision import agreed_dtype, compute_dtype, has_units, name_of
from drank.project.files import read_json

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution")
HALVES = {torch.bfloat16, torch.float16}


def processor(monkeypatch, machine="x86_64", vendor="", onednn=False, amx=False, avx512_bf16=False, onednn_fp16=False):
    """A processor of these facts in the place of this one."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: onednn_fp16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(precision, "cpu_fact", lambda _: vendor)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"vendor": "AuthenticAMD"}, torch.float32),  # AVX2
        ({"vendor": "GenuineIntel", "onednn": True}, torch.float32),  # AVX-512 alone: bfloat16 is emulated
        ({"vendor": "GenuineIntel", "onednn": True, "avx512_bf16": True}, torch.float32),
        ({"vendor": "AuthenticAMD", "onednn": True, "avx512_bf16": True}, torch.bfloat16),
        ({"vendor": "GenuineIntel", "onednn": True, "avx512_bf16": True, "amx": True}, torch.bfloat16),
        ({"vendor": "AuthenticAMD", "avx512_bf16": True, "amx": True}, torch.float32),  # oneDNN was told not to
        ({"machine": "AMD64", "vendor": "Intel64 Family 6", "onednn": True, "avx512_bf16": True}, torch.float32),
        ({"machine": "aarch64", "onednn": True}, torch.bfloat16),
        ({"machine": "arm64"}, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_facts_of_a_processor_decide(monkeypatch, caplog, facts, expected):
    processor(monkeypatch, **facts)
    assert compute_dtype("auto", "cpu") == expected
    assert caplog.messages == []


def test_what_an_older_torch_cannot_tell_is_not_there(monkeypatch):
    processor(monkeypatch, vendor="AuthenticAMD", onednn=True)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert compute_dtype("auto", "cpu") == torch.float32


def test_the_vendor_is_the_one_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "CPU_FACTS", tmp_path / "cpuinfo")
    precision.CPU_FACTS.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n")
    assert precision.cpu_fact("vendor_id") == "AuthenticAMD"
    monkeypatch.setattr(precision, "CPU_FACTS", tmp_path / "none")
    monkeypatch.setattr(precision.platform, "processor", lambda: "Intel64 Family 6 Model 207, GenuineIntel")
    assert "Intel" in precision.cpu_fact("vendor_id")


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_if_its_hardware_does(monkeypatch, supported, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert compute_dtype("auto", "cuda") == compute_dtype("auto", "cuda:1") == expected
    assert has_units(torch.float16, "cuda")


@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_a_slow_type_is_allowed_with_a_warning(monkeypatch, caplog, asked):
    processor(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert name_of(compute_dtype(asked, "cpu")) == asked
    (message,) = caplog.messages
    assert message.startswith(f"{asked} is slow on this processor")
    assert "auto or float32" in message
    processor(monkeypatch, machine="aarch64", onednn=True, onednn_fp16=True)
    assert name_of(compute_dtype(asked, "cpu")) == asked
    assert caplog.messages == [message]


def test_processes_on_unlike_processors_compute_in_float32():
    assert agreed_dtype("bfloat16", "cpu", lambda mine: [mine, "float32"]) == torch.float32
    assert agreed_dtype("float16", "cpu", lambda mine: [mine, mine]) == torch.float16


class Products(TorchDispatchMode):
    """Notes matrix products: in 16 bits those of 16-bit numbers, or of float32 that may be rounded to bfloat16."""

    def __init__(self):
        super().__init__()
        self.in_16_bits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in PRODUCTS or "scaled_dot_product" in name or name.startswith("mkldnn"):
            found = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            self.in_16_bits.append(found & HALVES or torch.get_float32_matmul_precision() != "highest")
        return func(*args, **kwargs or {})


HEALED = {
    "objective": "distillation", "n_windows": 4, "window_length": 16, "epochs": 1,
    "batch_windows": 2, "learning_rate": 1.0e-2, "rank": 2, "alpha": 4, "threads": 1,
}  # fmt: skip
MEASURED = {
    "calibration_seed": 0, "metric": "input", "units": "matrix", "sensitivity_windows": 1, "sensitivity_ratios": [0.5],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(reproduced, tmp_path_factory):
    """A copy of the project that no dvc.lock holds to its bytes, with a sensitivity and a healed variant to compute."""
    root = tmp_path_factory.mktemp("precision") / "project"
    shutil.copytree(reproduced, root, symlinks=True, ignore=shutil.ignore_patterns("dvc.lock", ".dvc", ".git"))
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["variants"]["healed"] = document["variants"]["kfac-80"] | {"healing": HEALED}
    document["spectrum"]["measured"] = MEASURED
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    allocation.main("healed", root)
    return root


@pytest.fixture
def asked_for(root):
    """Changes ``compute.dtype`` for one test."""
    before = (root / "params.yaml").read_text()
    yield lambda dtype: (root / "params.yaml").write_text(before.replace("dtype: auto", f"dtype: {dtype}"))
    (root / "params.yaml").write_text(before)


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def rebuilt(root):
    """The comparison of a folder with one of the same weights and another card."""
    other = root / "data/models/again"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(root / "data/models/kfac-80", other)
    (other / "README.md").write_text("another")
    (other / "SHA256SUMS").unlink()
    told = check_rebuilt(Folder(root / "data/models/kfac-80"), Folder(other), root / "data/sampling/test.safetensors")
    shutil.rmtree(other)
    assert "divergence on news 0 nats per token" in told


def recorded(root, file, *path):
    """A value of a JSON file of the project."""
    return functools.reduce(operator.getitem, path, read_json(root / file))


PASSES = {
    "covariance": (lambda root: covariance.main("0", root), ("data/covariance/0/summary.json", "dtype")),
    "sensitivity": (
        lambda root: spectrum.main("measured", root),
        ("data/spectrum/measured/summary.json", "computed_in", "sensitivity"),
    ),
    "evaluation": (lambda root: evaluation.main("kfac-80", root), ("results/kfac-80.json", "protocol", "dtype")),
    "healing": (
        lambda root: compression.main("healed", root),
        ("data/compression/healed/config.json", "quantization_config", "provenance", "healed_in"),
    ),
    "rebuilt": (rebuilt, None),
}


@pytest.mark.parametrize("name", PASSES)
def test_without_units_no_stage_multiplies_in_bfloat16(root, monkeypatch, name):
    stage, place = PASSES[name]
    processor(monkeypatch)
    with Products() as seen:
        stage(root)
    assert seen.in_16_bits
    assert not any(seen.in_16_bits)
    assert not place or recorded(root, *place) == "float32"
    processor(monkeypatch, machine="aarch64", onednn=True)
    with Products() as seen:
        stage(root)
    assert any(seen.in_16_bits), "such products are seen"


def test_sums_of_a_slow_type_that_was_asked_for_are_in_float32(root, asked_for, monkeypatch):
    """Covariances of bfloat16 rows: the passes were asked for, the products of the covariances were not."""
    processor(monkeypatch)
    seen = []
    set_precision = torch.set_float32_matmul_precision
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda p: (seen.append(p), set_precision(p)))
    asked_for("bfloat16")
    covariance.main("0", root)
    assert seen == []
    assert recorded(root, "data/covariance/0/summary.json", "dtype") == "bfloat16"
    processor(monkeypatch, machine="aarch64", onednn=True)
    covariance.main("0", root)
    assert "medium" in seen


def test_every_pass_runs_in_float16_and_stores_bfloat16(root, asked_for):
    asked_for("float16")
    for name in ("covariance", "sensitivity", "healing", "evaluation"):
        stage, place = PASSES[name]
        stage(root)
        assert recorded(root, *place) == "float16"
    stored = load_file(root / "data/compression/healed/model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.bfloat16}
    assert recorded(root, "data/compression/healed/config.json", "dtype") == "bfloat16"
