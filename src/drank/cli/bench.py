"""``drank bench``: how fast variants are, over the dense model."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import Root
from drank.project.command import quieten_libraries

if TYPE_CHECKING:
    from drank.model.benchmark import Subject

PACKAGES = ("drank", "torch", "transformers")


class BenchError(ValueError):
    """There is no model to time under a name, or no such device."""


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(frozen=True)
class Target:
    """A folder of a model under the name that it was asked by; ``dense`` for a variant that nothing compresses."""

    name: str
    folder: Path
    dense: bool = False


@dataclass(frozen=True)
class Conditions:
    """How models are run. It travels to the process of each model."""

    device: str
    dtype: str
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VARIANT]...", help="Variants of params.yaml, or folders of models; all variants."),
    ] = None,
    root: Root = Path(),
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt, and of a window of the batch.")
    ] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in the batch of the forward-only pass.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own choice.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type that models are loaded in; auto: bfloat16 where it is fast, else float32.")
    ] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda if there is one.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all samples as JSON.", dir_okay=False)
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the ratios into this PNG file.", dir_okay=False)] = None,
    track: Annotated[bool, typer.Option("--track", help="Add the medians to the variants' runs in MLflow.")] = False,
) -> None:
    """Time models against each other: prefill, decoding, first token, forward-only throughput, memory, disk.

    Each is in a process of its own, and they are timed in turn. Ratios, taken within a round, are to the dense variant
    if it is among them, else to the first; on a machine that is shared, believe them before the absolute figures.
    """
    from rich.console import Console

    from drank.model.precision import compute_dtype, name_of
    from drank.project.files import write_bytes, write_json
    from drank.views.pictures import png
    from drank.views.speed import bars, caption, table

    found, place = find_targets(root, targets or []), checked_device(device)
    chosen = name_of(compute_dtype(dtype.value, place))
    conditions = Conditions(place, chosen, threads, prompt_tokens, new_tokens, batch_size, repeats)
    results = run(found, conditions)
    if json_file is not None:
        write_json(json_file, results)
    if picture is not None:
        write_bytes(picture, png(bars(results)))
    # On a terminal the table fits itself to it; in a log file, where the width is unknown, it must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table(results))
    console.print(caption(results), markup=False, soft_wrap=True)
    if track:
        log(root, found, results)


def find_targets(root: Path, names: Sequence[str]) -> tuple[Target, ...]:
    """What names stand for, each once: the folder of a model, or else a variant; without names, all variants.

    Raises:
        BenchError: a name that stands for nothing, or a variant whose folder is not there.
        ParamsError: no params.yaml, or a wrong one, where a name is not a folder.
    """
    from drank.project.params import read_params

    found = []
    for name in dict.fromkeys(names or read_params(root / "params.yaml").variants):
        if _is_model(Path(name)):
            found.append(Target(name, Path(name)))
            continue
        if Path(name).is_dir() or os.sep in name:
            raise BenchError(f"{name}: not the folder of a model: it has no config.json, or no *.safetensors")
        _, preset = read_params(root / "params.yaml").variant(name)
        folder = root / "data/models" / name
        if not _is_model(folder):
            raise BenchError(f"{folder}: not found; fetch it with `dvc checkout`, `dvc pull` or `dvc repro`")
        found.append(Target(name, folder, preset.allocation == "dense"))
    return tuple(found)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and weights_bytes(folder) > 0


def checked_device(asked: str | None) -> str:
    """The device that is asked for, else CUDA's if there is one.

    Raises:
        BenchError: it is not here.
    """
    import torch

    n = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if n else []), *(f"cuda:{index}" for index in range(n))]
    if asked is not None and asked not in here:
        raise BenchError(f"device {asked!r}: it must be cpu or cuda, and torch sees {n} CUDA devices here")
    return asked or ("cuda" if n else "cpu")


def run(targets: Sequence[Target], conditions: Conditions) -> dict[str, Any]:
    """Measure, and put all of it into one document.

    Raises:
        BenchmarkError: what was asked cannot be timed.
    """
    from drank.model.benchmark import FIGURES, measure
    from drank.project.progress import progress

    started = environment(conditions.device)
    with ExitStack() as stack:
        # In one process models would share what torch keeps, such as kernels compiled for the shapes of matrices and
        # freed memory, and nobody could say whose memory is whose.
        workers = {t.name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for t in targets}
        loading = {target.name: workers[target.name].submit(_load, target.folder, conditions) for target in targets}
        loaded = {name: done.result() for name, done in progress(loading.items(), desc="loading", unit="models")}
        runs = {name: partial(_ask, executor) for name, executor in workers.items()}
        samples = measure(runs, conditions.repeats, progress=partial(progress, desc="timing", unit="rounds"))
    for target in targets:
        samples[target.name] |= {"memory": [loaded[target.name][0]], "disk": [float(weights_bytes(target.folder))]}
    reference = next((target for target in targets if target.dense), targets[0]).name
    return {
        "format_version": 2,
        "reference": reference,
        "units": FIGURES | dict.fromkeys(("memory", "disk"), "bytes"),
        "conditions": asdict(conditions) | {"threads": loaded[reference][1]},
        "environment": started,
        "folders": {target.name: str(target.folder) for target in targets},
        "models": {
            name: {figure: spread(values, samples[reference][figure]) for figure, values in figures.items()}
            for name, figures in samples.items()
        },
    }


_here: dict[str, "Subject"] = {}


def _load(folder: Path, conditions: Conditions) -> tuple[float, int]:
    """Load a model into this process and generate with it once; the bytes that took at their peak, and the threads."""
    quieten_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from drank.model.benchmark import Subject, peak_memory

    disable_progress_bar()
    if conditions.threads is not None:
        torch.set_num_threads(conditions.threads)
    # On the CPU libraries count too; so they are imported before, by building the model without its weights.
    config, device = AutoConfig.from_pretrained(folder), torch.device(conditions.device)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    before = peak_memory(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, conditions.dtype)).to(device).eval()
    # The same ids for every model and call: what a pass costs does not depend on them.
    shape = (conditions.batch_size, conditions.prompt_tokens)
    windows = torch.randint(len(model.get_input_embeddings().weight), shape, generator=torch.Generator().manual_seed(0))
    _here["subject"] = Subject(model, windows[:1], windows, conditions.new_tokens)
    _here["subject"]("generation")
    grown = max(1, peak_memory(device) - before)  # a small model may fit into what the libraries have left
    return float(grown), torch.get_num_threads()


def _time(part: str) -> dict[str, float]:
    return _here["subject"](part)


def _ask(executor: ProcessPoolExecutor, part: str) -> dict[str, float]:
    return executor.submit(_time, part).result()


def weights_bytes(folder: Path) -> int:
    """Bytes of weights on disk, counted as in results/<variant>.json."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def environment(device: str) -> dict[str, Any]:
    """What figures depend on beside the model and the options."""
    import torch

    on_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def spread(samples: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """A figure of one model as the document has it: quartiles, all rounds, and its ratio to the reference's."""
    from drank.model.benchmark import Quartiles

    ratios = Quartiles.of_ratios(samples, reference)
    return asdict(Quartiles.of(samples)) | {"samples": list(samples), "over_reference": asdict(ratios)}


def log(root: Path, targets: Sequence[Target], results: Mapping[str, Any]) -> None:
    """Add medians, and ratios to the reference, to the MLflow run of each folder; say where there is none."""
    from drank.project.dvc import dvc_md5
    from drank.tracking import log_speed

    conditions = {key: results[key] for key in ("conditions", "environment", "reference")}
    for target in targets:
        figures = {}
        for figure, value in results["models"][target.name].items():
            figures[f"speed/{figure}"] = float(value["median"])
            figures[f"speed/{figure}_ratio"] = value["over_reference"]["median"]
        logged = log_speed(root, dvc_md5(target.folder), figures, conditions)
        if logged is None:
            typer.echo(f"{target.name}: no MLflow run has this folder; `drank track` makes one for each variant")
        else:
            typer.echo(f"{target.name}: speed added to {logged.link}")
