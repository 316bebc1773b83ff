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
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch import Tensor

    from drank.model.benchmark import Subject

PACKAGES = ("drank", "torch", "transformers")
SIZES = ("memory", "disk")
# Unit that people read, its size in the unit that is measured, decimals.
SHOWN = {
    "prefill": ("tokens/s", 1.0, 0),
    "decode": ("tokens/s", 1.0, 1),
    "first_token": ("ms", 1e-3, 0),
    "forward_only": ("tokens/s", 1.0, 0),
    "memory": ("MB", 1e6, 0),
    "disk": ("MB", 1e6, 1),
}
SMALLER_IS_BETTER = ("first_token", "memory", "disk")
MEMORY = {
    "cpu": "growth of the peak resident memory of a process that loads the model and generates, without libraries",
    "cuda": "peak of what torch allocated on the device in a process that loads the model and generates",
}


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
    from drank.model.precision import compute_dtype, name_of
    from drank.project.files import write_json

    found, place = find_targets(root, targets or []), device or default_device()
    check_device(place)
    chosen = name_of(compute_dtype(dtype.value, place))
    conditions = Conditions(place, chosen, threads, prompt_tokens, new_tokens, batch_size, repeats)
    results = run(found, conditions)
    if json_file is not None:
        write_json(json_file, results)
    if picture is not None:
        save(picture, results)
    show(results)
    if track:
        log(root, found, results)


def find_targets(root: Path, names: Sequence[str]) -> tuple[Target, ...]:
    """The targets of names, each once: the folder of a model, or else a variant; without names, all variants.

    Raises:
        BenchError: a name that stands for nothing, or a variant whose folder is not there.
        ParamsError: no params.yaml, or a wrong one, where a name is not a folder.
    """
    from drank.project.params import read_params

    found = []
    for name in dict.fromkeys(names or read_params(root / "params.yaml").variants):
        if (Path(name) / "config.json").is_file():
            found.append(Target(name, Path(name)))
            continue
        if Path(name).is_dir() or os.sep in name:
            raise BenchError(f"{name}: not the folder of a model: it has no config.json")
        _, preset = read_params(root / "params.yaml").variant(name)
        folder = root / "data/models" / name
        if not (folder / "config.json").is_file():
            raise BenchError(f"{folder}: not found; fetch it with `dvc checkout`, `dvc pull` or `dvc repro`")
        found.append(Target(name, folder, preset.allocation == "dense"))
    return tuple(found)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Refuse a device that is not here.

    Raises:
        BenchError: such a device.
    """
    import torch

    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known or (name == "cuda" and not torch.cuda.is_available()):
        raise BenchError(f"device {name!r}: it must be cpu or cuda, and torch sees {len(known) - 2} CUDA devices here")


def run(targets: Sequence[Target], conditions: Conditions) -> dict[str, Any]:
    """Measure, and put all of it into one document.

    Raises:
        BenchError: no such device.
        BenchmarkError: what was asked cannot be timed.
    """
    from drank.model.benchmark import FIGURES, measure
    from drank.project.progress import progress

    check_device(conditions.device)
    started = environment(conditions.device)
    with ExitStack() as stack:
        workers = {target.name: stack.enter_context(worker()) for target in targets}
        loading = {target.name: workers[target.name].submit(_load, target.folder, conditions) for target in targets}
        memory = {name: done.result() for name, done in progress(loading.items(), desc="loading", unit="models")}
        threads = workers[targets[0].name].submit(_threads).result()
        runs = {name: partial(_ask, executor) for name, executor in workers.items()}
        samples = measure(runs, conditions.repeats, progress=partial(progress, desc="timing", unit="rounds"))
    sizes = {target.name: {"memory": memory[target.name], "disk": weights_bytes(target.folder)} for target in targets}
    reference = next((target for target in targets if target.dense), targets[0]).name
    figures = {
        target.name: {
            **{figure: spread(samples[target.name][figure], samples[reference][figure]) for figure in FIGURES},
            **{size: sized(value, sizes[reference][size]) for size, value in sizes[target.name].items()},
        }
        for target in targets
    }
    return {
        "format_version": 1,
        "reference": reference,
        "units": FIGURES | dict.fromkeys(SIZES, "bytes"),
        "conditions": asdict(conditions) | {"threads": threads},
        "environment": started,
        "folders": {target.name: str(target.folder) for target in targets},
        "models": figures,
    }


def worker() -> ProcessPoolExecutor:
    """A fresh process for one model.

    In one process models would share what torch keeps, such as kernels compiled for the shapes of matrices and freed
    memory, and nobody could say whose memory is whose.
    """
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


_here: dict[str, "Subject"] = {}


def _load(folder: Path, conditions: Conditions) -> int:
    """Load a model into this process and generate with it once; the bytes that took at their peak."""
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
    windows = random_ids(conditions, model.config.vocab_size)
    _here["subject"] = Subject(model, windows[:1], windows, conditions.new_tokens)
    _here["subject"]("generation")
    return peak_memory(device) - before


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _time(part: str) -> dict[str, float]:
    return _here["subject"](part)


def _ask(executor: ProcessPoolExecutor, part: str) -> dict[str, float]:
    return executor.submit(_time, part).result()


def random_ids(conditions: Conditions, vocabulary: int) -> "Tensor":
    """The same windows of token ids on every call: what a pass costs does not depend on them."""
    import torch

    shape = (conditions.batch_size, conditions.prompt_tokens)
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def weights_bytes(folder: Path) -> int:
    """Bytes of weights on disk, counted as in results/<variant>.json."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def environment(device: str) -> dict[str, Any]:
    """Things that figures depend on beside the model and the options."""
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


def sized(value: int, reference: int) -> dict[str, Any]:
    """A size as the document has it; a model without weights in safetensors has nothing to compare."""
    return {"value": value, "over_reference": value / reference if reference else None}


def show(results: Mapping[str, Any]) -> None:
    """The table, and how to read it, on standard output."""
    from rich.console import Console

    # On a terminal the table fits itself to it; in a log file, where the width is unknown, it must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table(results))
    conditions, here = results["conditions"], results["environment"]
    console.print(
        f"x: ratio to {results['reference']} within a round, median [quartiles] of {conditions['repeats']} rounds; "
        f"below it the median. For tokens/s more is better, for the others less.\n"
        f"Prompt of {conditions['prompt_tokens']} tokens, {conditions['new_tokens']} new ones, greedy, batch 1; "
        f"forward only: {conditions['batch_size']} windows at once, no cache, all logits.\n"
        f"Memory: {MEMORY['cuda' if conditions['device'].startswith('cuda') else 'cpu']}.\n"
        f"{here['device']} ({conditions['device']}), {conditions['threads']} threads, {conditions['dtype']}, "
        f"load {here['load_average']:.1f} on {here['cpus']} CPUs at the start, torch {here['torch']}, "
        f"transformers {here['transformers']}",
        markup=False,
        soft_wrap=True,
    )


def table(results: Mapping[str, Any]) -> "Table":
    """A row per model: ratio to the reference, and below it the figure itself."""
    from rich.table import Table

    sheet = Table(show_lines=True)
    sheet.add_column("model", overflow="fold")
    for figure, (unit, _, _) in SHOWN.items():
        sheet.add_column(f"{figure.replace('_', ' ')}\n{unit}", justify="right")
    for name, figures in results["models"].items():
        sheet.add_row(name, *(_cell(figures[figure], figure) for figure in SHOWN))
    return sheet


def _cell(value: Mapping[str, Any], figure: str) -> str:
    _, scale, decimals = SHOWN[figure]
    ratio = value["over_reference"]
    if figure in SIZES:
        told = "" if ratio is None else f"x{ratio:.2f}"
        return f"{told}\n{value['value'] / scale:,.{decimals}f}"
    spread = f"x{ratio['median']:.2f} \\[{ratio['lower']:.2f}, {ratio['upper']:.2f}]"
    return f"{spread}\n{value['median'] / scale:,.{decimals}f}"


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the ratios into a PNG file."""
    from drank.project.files import write_bytes
    from drank.views.pictures import png

    write_bytes(path, png(bars(results)))


def bars(results: Mapping[str, Any]) -> "Figure":
    """Ratio to the reference, a panel per figure, a bar per model with the quartiles; blue is better, red worse."""
    from matplotlib.figure import Figure

    names = list(results["models"])
    canvas = Figure(figsize=(2.2 * len(SHOWN) + 1, 1.2 + 0.35 * len(names)), layout="constrained")
    panels = canvas.subplots(1, len(SHOWN), sharey=True)
    for axes, (figure, (unit, _, _)) in zip(panels, SHOWN.items(), strict=True):
        for row, name in enumerate(names):
            ratio = results["models"][name][figure]["over_reference"]
            if ratio is None:
                continue
            spread = ratio if isinstance(ratio, dict) else dict.fromkeys(("lower", "median", "upper"), ratio)
            median = spread["median"]
            better = median <= 1 if figure in SMALLER_IS_BETTER else median >= 1
            errors = [[median - spread["lower"]], [spread["upper"] - median]]
            axes.barh(row, median, color="#4c78a8" if better else "#c44e52", height=0.7, xerr=errors, capsize=2)
            axes.text(0.02, row, f"{median:.2f}", va="center", color="white", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        direction = "less" if figure in SMALLER_IS_BETTER else "more"
        axes.set_title(f"{figure.replace('_', ' ')}, {unit}\n({direction} is better)", fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    conditions = results["conditions"]
    canvas.supxlabel(
        f"ratio to {results['reference']}; {results['environment']['device']}, {conditions['threads']} threads, "
        f"{conditions['dtype']}",
        fontsize=9,
    )
    return canvas


def log(root: Path, targets: Sequence[Target], results: Mapping[str, Any]) -> None:
    """Add medians, and ratios to the reference, to the MLflow run of each folder; say where there is none."""
    from drank.project.dvc import dvc_md5
    from drank.tracking import log_speed

    conditions = {key: results[key] for key in ("conditions", "environment", "reference")}
    for target in targets:
        figures = {}
        for figure, value in results["models"][target.name].items():
            ratio = value["over_reference"]
            figures[figure] = value["value"] if figure in SIZES else value["median"]
            figures[f"{figure}_ratio"] = ratio["median"] if isinstance(ratio, dict) else ratio
        figures = {f"speed/{figure}": float(value) for figure, value in figures.items() if value is not None}
        logged = log_speed(root, dvc_md5(target.folder), figures, conditions)
        if logged is None:
            typer.echo(f"{target.name}: no MLflow run has this folder; `drank track` makes one for each variant")
        else:
            typer.echo(f"{target.name}: speed added to {logged.link}")
