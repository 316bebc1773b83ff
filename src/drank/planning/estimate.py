"""About how long every stage takes on this machine: FLOPs from the model's shape, over speeds that were just measured.

To within a factor of two for decoders like Llama; other architectures are taken for one of as many parameters. Tasks of
lm-eval's own are not counted, nor are downloads. The formulas are numbers only; what needs torch is ``measure``.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from drank.model.text import N_CHOICES, ROLLING_CHARACTERS
from drank.planning import footprint
from drank.planning.footprint import EIGH, Setting, Shape
from drank.planning.machine import Speed, measure
from drank.project.params import Healing, Params, Spectrum, read_params

# Shares of the speed of square products that products within stages reach. A covariance pass in bfloat16 had 369 of 867
# GFLOP/s (docs/performance.md); forward passes in float32 had 177 of 210 on one processor and 145 of 310 on another.
PASSES = {"bfloat16": 0.45, "float16": 0.45, "float32": 0.6}
FLOAT64 = 0.8  # a guess
# Seconds per token and word of the vocabulary, scored or drawn and sent back: what the covariance stage with gradients
# took beyond its FLOPs there, and a fifth of it. Nothing on a GPU.
SCORED, SENT_BACK = 5e-9, 25e-9
# Processor seconds from a start to the first work, measured on two cores: stages import torch and transformers in 3 to
# 5 s, lm-eval in about 3 more; DVC adds 0.2. On a busy machine twice what this process took to import torch counts.
START, LM_EVAL = 4.0, 3.0
WRITE, READ = 2e8, 5e8  # bytes per second: DVC hashes and copies 540 MB in 2.6 s; MD5 of what a stage reads
ITEM = 80  # tokens of an item of a task: at most 60 words and the padding of a batch
CHARACTERS = 4  # of a token of English


@dataclass(frozen=True)
class Model:
    """A model's shape, and how many parameters it stores over those of a Llama of this shape."""

    shape: Shape
    parameters: float = 1.0


def seconds(
    params: Params,
    model: Model,
    speed: Callable[[int, str], Speed],
    test_windows: int | None = None,
    start: float = START,
) -> dict[str, float]:
    """Seconds of every stage by name in DVC.

    Args:
        speed: of a number of threads on a device.
        test_windows: windows of all test texts together, where params.yaml does not tell their number.
        start: seconds from the start of a stage to its first work.
    """
    on, sampling, shape = params.covariance, params.sampling, model.shape
    weights = 2 * footprint.model_parameters(shape) * model.parameters
    calibrating, testing = speed(on.threads, on.device), speed(params.evaluation.threads, params.evaluation.device)
    found = {"raw": start + weights / READ + weights / WRITE, "sampling": start, "report": start}
    for seed in sampling.calibration_seeds:
        found[f"covariance@{seed}"] = start + weights / READ + _covariance(params, model, calibrating)
    for key, spectrum in params.spectrum.items():
        written = footprint.spectrum_files(shape, _setting(params, spectrum), *_units(spectrum, shape))
        moved = (weights + footprint.covariance_files(shape, spectrum.metric == "kfac")) / READ + written / WRITE
        found[f"spectrum@{key}"] = start + moved + _spectrum(params, model, spectrum, calibrating)
    more = start / START * LM_EVAL if params.evaluation.tasks else 0.0
    n_windows = test_windows
    if isinstance(sampling.n_test_windows, int):
        n_windows = sampling.n_test_windows * len(params.text)
    for name, variant in params.variants.items():
        _, preset = params.variant(name)
        kept = 2 * footprint.compressed_parameters(shape, variant.size_ratio) * model.parameters
        pivots = footprint.pivot_flops(shape, variant.size_ratio) if preset.storage == "pivot" else 0.0
        # Spectra are read as far as the variant's ranks go: no more than all of them once.
        found[f"allocation@{name}"] = start
        found[f"compression@{name}"] = (
            start + 2 * weights / READ + kept / WRITE + pivots / (FLOAT64 * calibrating.float64)
        )
        if variant.healing:
            found[f"compression@{name}"] += _healing(variant.healing, variant.size_ratio, model, speed)
        tested = _evaluation(params, model, variant.size_ratio, n_windows or 0, testing)
        found[f"evaluation@{name}"] = start + more + kept / READ + tested
        found[f"release@{name}"] = start / 2 + kept / READ + kept / WRITE
    return found


def _healing(asked: Healing, size_ratio: float, model: Model, speed: Callable[[int, str], Speed]) -> float:
    """Forwards, and as much for each of activations and adapters backwards."""
    tokens = asked.epochs * asked.n_windows * asked.window_length
    passes = 3 * footprint.evaluation_flops(model.shape, size_ratio, tokens, asked.window_length)
    if asked.objective == "distillation":
        passes += footprint.evaluation_flops(model.shape, 1.0, tokens, asked.window_length)
    scores = _vocabulary(model.shape, tokens, SENT_BACK, asked.device)
    return _passes(passes * model.parameters, speed(asked.threads, asked.device)) + scores


def _passes(flops: float, speed: Speed) -> float:
    return flops / (PASSES[speed.dtype] * speed.passes)


def _vocabulary(shape: Shape, tokens: int, each: float, device: str) -> float:
    return tokens * shape.vocabulary * each * (device == "cpu")


def _covariance(params: Params, model: Model, speed: Speed) -> float:
    """Passes, of which some windows are sent back, sums, and what is written."""
    on, setting = params.covariance, _setting(params)
    flops = footprint.covariance_flops(model.shape, setting, False, on.offload)
    scores = 0.0
    if on.fisher != "none":
        n_windows = on.fisher_windows or setting.n_windows
        back = Setting(min(n_windows, setting.n_windows), setting.window_length, setting.batch_windows, ())
        flops += footprint.covariance_flops(model.shape, back, True, on.offload)
        flops -= footprint.covariance_flops(model.shape, back, False, on.offload)
        scores = _vocabulary(model.shape, back.tokens, SENT_BACK, on.device)
    written = footprint.covariance_files(model.shape, on.fisher != "none") * model.parameters
    return (_passes(flops * model.parameters, speed) + scores) / on.processes + written / WRITE


def _spectrum(params: Params, model: Model, asked: Spectrum, speed: Speed) -> float:
    """Eigenproblems, which are far slower than products, and products."""
    shape, setting, kfac = model.shape, _setting(params, asked), asked.metric == "kfac"
    blocks, layers = _units(asked, shape)
    if layers > 1:
        units = list(footprint.grouped_units(shape, layers))
    else:
        units = list(footprint.spectrum_units(shape, setting, blocks)) * shape.n_layers
    eigen = sum(EIGH * min(unit) ** 3 for unit in units)  # roots are Cholesky factors, next to nothing beside it
    products = sum(footprint.spectrum_flops(*unit, kfac) for unit in units)
    products -= sum(EIGH * min(unit) ** 3 * (2 if kfac or unit[0] > unit[1] else 1) for unit in units)
    if blocks:
        products += shape.n_layers * footprint.channel_flops(shape, setting)
    found = eigen / speed.eigenproblem + products / (FLOAT64 * speed.float64)
    tried = asked.sensitivity_windows * len(asked.sensitivity_ratios) * len(shape.linears) * shape.n_layers
    tokens = tried * setting.window_length
    scored = _passes(footprint.evaluation_flops(shape, 1.0, tokens, setting.window_length), speed)
    scored += _vocabulary(shape, tokens, SCORED, params.covariance.device)
    return (found + scored) * model.parameters / params.covariance.processes


def _evaluation(params: Params, model: Model, ratio: float, n_windows: int, speed: Speed) -> float:
    """Test windows, and items of the tasks that sampling writes."""
    sampling, on = params.sampling, params.evaluation
    tokens = n_windows * sampling.window_length
    tokens += sum(ROLLING_CHARACTERS // CHARACTERS for task in on.tasks if task.endswith("_rolling"))
    requests = {"last_word": 1, "next_sentence": N_CHOICES}
    tokens += sum(requests.get(task, 0) for task in on.tasks) * sampling.n_task_items * ITEM
    flops = footprint.evaluation_flops(model.shape, ratio, tokens, sampling.window_length) * model.parameters
    return (_passes(flops, speed) + _vocabulary(model.shape, tokens, SCORED, on.device)) / on.processes


def _setting(params: Params, spectrum: Spectrum | None = None) -> Setting:
    sampling = params.sampling
    cuts = spectrum.cuts if spectrum else ()
    return Setting(sampling.n_windows, sampling.window_length, params.covariance.batch_windows, cuts)


def _units(spectrum: Spectrum, shape: Shape) -> tuple[bool, int]:
    """Whether MLPs are cut, and how many layers share a basis."""
    grouped = shape.kv_heads < shape.heads and not spectrum.even_with_grouped_heads
    return spectrum.units == "block", 1 if grouped else spectrum.layers


# Reading a folder


def read_model(folder: Path) -> Model | None:
    """The model in a Hugging Face folder; None if its config.json does not tell its sizes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)

    def size(*names: str, otherwise: int | None = None) -> Any:
        return next((config[name] for name in names if config.get(name)), otherwise)

    hidden, n_layers = size("hidden_size", "n_embd", "d_model"), size("num_hidden_layers", "n_layer", "n_layers")
    heads, vocabulary = size("num_attention_heads", "n_head", "n_heads"), size("vocab_size")
    if not all(isinstance(n, int) for n in (hidden, n_layers, heads, vocabulary)):
        return None
    mlp = size("intermediate_size", "ffn_dim", "n_inner", otherwise=4 * hidden)
    kv_heads = size("num_key_value_heads", otherwise=heads)
    gated, tied = bool(config.get("intermediate_size")), bool(config.get("tie_word_embeddings", False))
    shape = Shape(folder.name, n_layers, hidden, mlp, heads, kv_heads, vocabulary, gated, tied)
    stored = sum(map(_numbers, folder.glob("*.safetensors")))
    return Model(shape, stored / footprint.model_parameters(shape) if stored else 1.0)


def _numbers(file: Path) -> int:
    """How many a safetensors file holds, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(row["shape"]) for name, row in header.items() if name != "__metadata__")


def read_test_windows(params: Params, root: Path) -> int:
    """Windows of all test texts, by the sizes of the texts, of which the calibration text gives a share."""
    tokens = 0.0
    for name in params.text:
        file = root / f"data/raw/text/{name}.jsonl"
        share = params.sampling.held_out_share if name == params.sampling.calibration_text else 1.0
        tokens += share * file.stat().st_size / CHARACTERS if file.is_file() else 0
    return int(tokens / params.sampling.window_length)


def measure_machine(params: Params) -> dict[str, Any]:
    """What times depend on beside the model, as JSON: seconds to the first work, speeds by threads and device.

    To be called while nothing else runs: beside one stage on two cores half of the speed is left.
    """
    start = max(START, 2 * (time.time() - psutil.Process().create_time()))
    places = {(section.threads, section.device) for section in (params.covariance, params.evaluation)}
    places |= {(v.healing.threads, v.healing.device) for v in params.variants.values() if v.healing}
    speeds = [[*place, asdict(measure(*place, params.compute.dtype))] for place in sorted(places)]
    return {"start": start, "speeds": speeds}


def main(folder: str = "", measured: str = "") -> None:
    """Print the machine, which is measured unless it is given, and seconds by stage for the model in ``folder``, or
    null where there is none or its shape is not known.

    A process of its own, which leaves neither torch nor the memory of a GPU with its parent.
    """
    params = read_params(Path("params.yaml"))
    machine = json.loads(measured) if measured else measure_machine(params)
    speeds = {(threads, device): Speed(**speed) for threads, device, speed in machine["speeds"]}
    found = None
    if folder and (model := read_model(Path(folder))):
        windows = read_test_windows(params, Path())
        found = seconds(params, model, lambda *place: speeds[place], windows, machine["start"])
    sys.stdout.write(json.dumps({"machine": machine, "seconds": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
