"""``drank bench``: how fast variants are, over the dense model."""

import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drank.cli.options import Root, console, variants, weights_bytes
from drank.project.command import quieten_libraries

if TYPE_CHECKING:
    from drank.model.benchmark import Subject

Dtype = StrEnum("Dtype", ["auto", "bfloat16", "float16", "float32"])
Device = StrEnum("Device", ["cpu", "cuda"])


class BenchError(ValueError):
    """There is no model to time under a name."""


@dataclass(frozen=True)
class Conditions:
    """How models are run. It travels to the process of each model."""

    device: str
    dtype: str
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    repeats: int
    batch_size: int = 4


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VARIANT]...",
            help="Variants of params.yaml, or folders of models; all variants.",
            autocompletion=variants,
        ),
    ] = None,
    root: Root = Path(),
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, and of each window.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; its own choice.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 where it is fast, else float32.")] = Dtype.auto,
    device: Annotated[Device | None, typer.Option(help="cuda if there is one.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all samples as JSON.", dir_okay=False)
    ] = None,
) -> None:
    """Time models against each other: prefill, decoding, first token, forward-only throughput, memory, disk.

    Each is in a process of its own, and they are timed in turn. Ratios, taken within a round, are to the dense variant
    if it is among them, else to the first; on a machine that is shared, believe them before the absolute figures.
    """
    import torch

    from drank.model.precision import compute_dtype, name_of
    from drank.project.files import write_json
    from drank.project.processes import check_device
    from drank.views.speed import caption, table

    folders, reference = find_models(root, targets or [])
    place = device.value if device else "cuda" if torch.cuda.is_available() else "cpu"
    check_device(place)
    chosen = name_of(compute_dtype(dtype.value, place))
    results = run(folders, reference, Conditions(place, chosen, threads, prompt_tokens, new_tokens, repeats))
    if json_file is not None:
        write_json(json_file, results)
    terminal = console()
    terminal.print(table(results))
    terminal.print(caption(results), soft_wrap=True)


def find_models(root: Path, names: Sequence[str]) -> tuple[dict[str, Path], str]:
    """Folders by the names of models or, in ``root``, of variants (all of them without names); the reference's name.

    Raises:
        BenchError: a folder that is missing or no model.
        ParamsError: no params.yaml, a wrong one, or one without a variant of this name.
    """
    from drank.project.params import read_params

    folders, dense = {}, []
    for name in names or read_params(root / "params.yaml").variants:
        if Path(name).is_dir() or os.sep in name:
            folders[name] = Path(name)
        else:
            folders[name] = root / "data/models" / name
            dense += [name] * (read_params(root / "params.yaml").variant(name)[1].allocation == "dense")
        if not ((folders[name] / "config.json").is_file() and weights_bytes(folders[name])):
            told = "not the folder of a model: it has no config.json, or no *.safetensors"
            raise BenchError(f"{folders[name]}: {told}; fetch a variant with `dvc checkout` or `dvc repro`")
    return folders, (dense or list(folders))[0]


def run(folders: Mapping[str, Path], reference: str, conditions: Conditions) -> dict[str, Any]:
    """Measure, and put all of it into one document.

    Raises:
        BenchmarkError: more tokens than a model has positions for.
    """
    from drank.model.benchmark import FIGURES, quartiles, round_robin
    from drank.project.progress import progress

    started = environment(conditions.device)
    # A server that has imported the libraries forks the processes, before torch has any thread.
    context = get_context("forkserver")
    context.set_forkserver_preload(["drank.model.benchmark", "transformers.modeling_utils"])
    with ExitStack() as stack:
        # In one process models would share what torch keeps, such as kernels compiled for the shapes of matrices and
        # freed memory, and nobody could say whose memory is whose.
        workers = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in folders}
        loading = {name: workers[name].submit(_load, folder, conditions) for name, folder in folders.items()}
        loaded = {name: done.result() for name, done in progress(loading.items(), desc="loading", unit="models")}
        parts = dict.fromkeys(part for part, _ in FIGURES.values())
        cases = {(name, part): partial(_ask, worker, part) for part in parts for name, worker in workers.items()}
        rounds = round_robin(cases, conditions.repeats, partial(progress, desc="timing", unit="rounds"))
    samples = {
        name: {figure: [row[figure] for row in rounds[name, part]] for figure, (part, _) in FIGURES.items()}
        | {"memory": [loaded[name][0]], "disk": [float(weights_bytes(folder))]}
        for name, folder in folders.items()
    }

    def spread(figure: str, values: list[float]) -> dict[str, Any]:
        over = quartiles(list(map(truediv, values, samples[reference][figure])))  # within a round
        return quartiles(values) | {"samples": values, "over_reference": over}

    return {
        "format_version": 2,
        "reference": reference,
        "units": {figure: unit for figure, (_, unit) in FIGURES.items()} | dict.fromkeys(("memory", "disk"), "bytes"),
        "conditions": asdict(conditions) | {"threads": loaded[reference][1]},
        "environment": started,
        "folders": {name: str(folder) for name, folder in folders.items()},
        "models": {name: {key: spread(key, row) for key, row in rows.items()} for name, rows in samples.items()},
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
    _here["subject"] = Subject(model, windows, conditions.new_tokens)
    _here["subject"]("generation")
    grown = max(1, peak_memory(device) - before)  # a small model may fit into what the libraries have left
    return float(grown), torch.get_num_threads()


def _time(part: str) -> dict[str, float]:
    return _here["subject"](part)


def _ask(executor: ProcessPoolExecutor, part: str) -> dict[str, float]:
    return executor.submit(_time, part).result()


def environment(device: str) -> dict[str, Any]:
    """Circumstances that figures depend on, beside the model and the options."""
    import torch

    from drank.model.precision import cpu_fact

    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_fact("model name"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("drank", "torch", "transformers")},
    }
