"""The cost of every stage here, from params.yaml and a model's shape: memory, disk, and about how long.

Times are FLOPs over speeds that were just measured, right to within a factor of two for decoders like Llama; another
architecture is taken for one of as many parameters. Tasks of lm-eval's own are not counted, nor are downloads. Numbers
only: nothing here imports torch.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drank.method.metrics import METRICS
from drank.planning import footprint
from drank.planning.footprint import Setting, Shape
from drank.planning.machine import Speed
from drank.project.params import Covariance, Evaluation, Healing, Params, Spectrum

# Shares of the speed of square products that products within stages reach. A covariance pass in bfloat16 had 369 of 867
# GFLOP/s (docs/performance.md); forward passes in float32 had 177 of 210 on one processor and 145 of 310 on another.
PASSES = {"bfloat16": 0.45, "float16": 0.45, "float32": 0.6}
FLOAT64 = 0.8  # a guess
# Seconds from a start to the first work: stages import torch and transformers, and evaluation lm-eval besides.
START, LM_EVAL = 4.0, 3.0
WRITE, READ = 2e8, 5e8  # bytes per second: DVC hashes and copies 540 MB in 2.6 s; MD5 of what a stage reads
ITEM = 80  # tokens per request of an item: at most 60 words and the padding of a batch
REQUESTS = {"last_word": 1, "next_sentence": 4}  # per item
ROLLING = 8192  # tokens of a rolling task's text


@dataclass(frozen=True)
class Model:
    """A model's shape, and how many parameters it stores over those of a Llama of this shape."""

    shape: Shape
    parameters: float = 1.0


@dataclass(frozen=True)
class Cost:
    """The cost of a stage, as far as it is known from shapes; zero is next to nothing.

    Attributes:
        on: the section whose threads, device and processes it has.
        memory, disk, read: bytes that it holds on its device at once, writes and reads.
        passes, products, eigenproblems: FLOPs of passes through a model, and of both others in float64.
        start: seconds to its first work.
    """

    on: Covariance | Evaluation | Healing
    memory: float = 0.0
    disk: float = 0.0
    read: float = 0.0
    passes: float = 0.0
    products: float = 0.0
    eigenproblems: float = 0.0
    start: float = START

    def seconds(self, speed: Speed) -> float:
        passes = self.passes / (PASSES[speed.dtype] * speed.passes)
        found = passes + self.eigenproblems / speed.eigenproblem + self.products / (FLOAT64 * speed.float64)
        return self.start + self.read / READ + self.disk / WRITE + found / getattr(self.on, "processes", 1)


def costs(params: Params, model: Model, n_test_windows: int = 0) -> dict[str, Cost]:
    """The cost of every stage by its name in DVC.

    Args:
        n_test_windows: windows of all test texts together, where params.yaml does not tell their number.
    """
    on, tested, shape, scale = params.covariance, params.evaluation, model.shape, model.parameters
    weights = 2 * footprint.model_parameters(shape) * scale
    found = {"raw": Cost(on, weights, weights, weights), "sampling": Cost(on), "report": Cost(on)}
    for seed in params.sampling.calibration_seeds:
        found[f"covariance@{seed}"] = _covariance(params, model, weights)
    for key, asked in params.spectrum.items():
        found[f"spectrum@{key}"] = _spectrum(params, model, asked, weights)
    if isinstance(params.sampling.n_test_windows, int):
        n_test_windows = params.sampling.n_test_windows * len(params.text)
    tokens = n_test_windows * params.sampling.window_length
    tokens += ROLLING * sum(task.endswith("_rolling") for task in tested.tasks)
    tokens += ITEM * params.sampling.n_task_items * sum(REQUESTS.get(task, 0) for task in tested.tasks)
    for name, variant in params.variants.items():
        pivot, ratio = params.variant(name)[1].storage == "pivot", variant.ratio
        kept = footprint.compressed_folder(shape, ratio, pivot) * scale
        # Spectra are read as far as the variant's ranks go: no more than all of them once.
        made = Cost(on, weights, kept, 2 * weights, products=footprint.pivot_flops(shape, ratio) * pivot)
        found[f"allocation@{name}"] = Cost(on)
        found[f"compression@{name}"] = _healed(made, variant.healing, model, ratio) if variant.healing else made
        held = kept + footprint.evaluation_peak(shape, _setting(params), tested.batch_windows)
        passes = footprint.evaluation_flops(shape, ratio, tokens, params.sampling.window_length) * scale
        start = START + LM_EVAL * bool(tested.tasks)
        found[f"evaluation@{name}"] = Cost(tested, held, read=kept, passes=passes, start=start)
        found[f"release@{name}"] = Cost(on, disk=kept, read=kept, start=START / 2)
    return found


def _covariance(params: Params, model: Model, weights: float) -> Cost:
    """Passes, of which some windows are sent back, and sums."""
    on, setting, shape, scale = params.covariance, _setting(params), model.shape, model.parameters
    kfac = on.fisher != "none"
    held = sum(footprint.memory(shape, setting, kfac, on.offload).values())
    written = footprint.covariance_files(shape, kfac) + footprint.hidden_states(shape, setting, kfac) * on.offload
    passes = footprint.covariance_flops(shape, setting, kfac, on.offload)
    return Cost(on, held * scale, written * scale, weights, passes * scale)


def _spectrum(params: Params, model: Model, asked: Spectrum, weights: float) -> Cost:
    """Eigenproblems, which are far slower than products, products, and passes that measure sensitivity."""
    shape, setting, kfac = model.shape, _setting(params, asked), METRICS[asked.metric].gradients is not None
    blocks, grouped = asked.units == "block", shape.kv_heads < shape.heads
    layers = 1 if grouped and not asked.even_with_grouped_heads else asked.layers
    # Roots are Cholesky factors, next to nothing beside the eigenproblem of a unit.
    eigen = sum(footprint.EIGH * min(unit) ** 3 for unit in footprint.spectra_units(shape, setting, blocks, layers))
    products = footprint.spectra_flops(shape, setting, kfac, blocks, layers) - eigen
    tried = asked.sensitivity_windows * len(asked.sensitivity_ratios) * len(shape.linears) * shape.n_layers
    passes = footprint.evaluation_flops(shape, 1.0, tried * setting.window_length, setting.window_length)
    held = float(sum(footprint.spectrum_memory(shape, blocks, params.covariance.threads).values()))
    written, scale = float(footprint.spectrum_files(shape, setting, blocks, layers)), model.parameters
    read = weights + footprint.covariance_files(shape, kfac)
    return Cost(params.covariance, held, written, read, passes * scale, products * scale, eigen * scale)


def _healed(made: Cost, asked: Healing, model: Model, ratio: float) -> Cost:
    """Forwards, and as much for each of activations and adapters backwards; distillation also asks the dense model."""
    shape, batch = model.shape, asked.batch_windows * asked.window_length
    tokens, length = asked.epochs * asked.n_windows * asked.window_length, asked.window_length
    distilled = asked.objective == "distillation"
    passes = 3 * footprint.evaluation_flops(shape, ratio, tokens, length)
    passes += distilled * footprint.evaluation_flops(shape, 1.0, tokens, length)
    peaks = footprint.passes(shape, batch)
    held = made.memory * (1 + distilled) + shape.n_layers * peaks["graph"] + peaks["head"]
    return Cost(asked, held, made.disk, made.read, passes * model.parameters, made.products, start=made.start)


def _setting(params: Params, spectrum: Spectrum | None = None) -> Setting:
    sampling, on, cuts = params.sampling, params.covariance, spectrum.cuts if spectrum else ()
    return Setting(sampling.n_windows, sampling.window_length, on.batch_windows, cuts, on.fisher_windows)


def seconds(costs: dict[str, Cost], speed: Callable[[int, str], Speed]) -> dict[str, float]:
    """Seconds of every stage, by the speed of a number of threads on a device."""
    return {name: cost.seconds(speed(cost.on.threads, cost.on.device)) for name, cost in costs.items()}


# Reading a folder


def read_model(folder: Path) -> Model | None:
    """The model in a Hugging Face folder; None if its config.json does not tell its sizes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = sum(map(_numbers, folder.glob("*.safetensors")))
    except (OSError, ValueError, KeyError):
        return None
    shape = read_shape(config, folder.name) if isinstance(config, dict) else None
    if shape is None:
        return None
    return Model(shape, stored / footprint.model_parameters(shape) if stored else 1.0)


def read_shape(config: dict[str, Any], name: str) -> Shape | None:
    """A model's shape from its config.json; None if that does not tell it."""
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
    return Shape(name, n_layers, hidden, mlp, heads, kv_heads, vocabulary, gated, tied)


def _numbers(file: Path) -> int:
    """How many a safetensors file holds, from its header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, file.stat().st_size)))
    return sum(math.prod(row["shape"]) for name, row in header.items() if name != "__metadata__")


def read_test_windows(params: Params, root: Path) -> int:
    """Windows of all test texts at four characters per token, by the sizes of the texts that are there."""
    tokens = 0.0
    for name in params.text:
        file = root / f"data/raw/text/{name}.jsonl"
        share = params.sampling.held_out_share if name == params.sampling.calibration_text else 1.0
        tokens += share * file.stat().st_size / 4 if file.is_file() else 0.0
    return int(tokens / params.sampling.window_length)
