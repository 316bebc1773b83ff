"""Evaluation: a variant's model, test windows and tasks -> results/<variant>.json, data/evaluation/<variant>.json."""

from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import drank.model.quantizer  # noqa: F401  the format of data/compression, seen by DVC's dependencies
from drank.model.perplexity import token_perplexity
from drank.model.precision import agreed_dtype, name_of
from drank.model.vocabulary import check_ids
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import read_json, read_tensors, write_json
from drank.project.params import Params, read_params
from drank.project.processes import Group, launch, must_launch, process_group
from drank.project.progress import progress
from drank.steps.evaluation import MAX_LENGTH, count_parameters, run_tasks


def main(variant: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    params.variant(variant)
    if must_launch(params.evaluation.processes):
        launch(params.evaluation.processes, "stages.evaluation", variant, "--root", str(root))
        return
    with process_group(params.evaluation.threads, params.evaluation.device) as group:
        evaluate(variant, root, params, group)


def evaluate(variant: str, root: Path, params: Params, group: Group) -> None:
    asked, _ = params.variant(variant)
    inputs = Inputs(root)
    allocation = read_json(inputs / f"data/allocation/{variant}.json")
    tests = read_tensors(inputs / "data/sampling/test.safetensors")
    short = inputs / "data/sampling/last.safetensors"
    last_windows = read_tensors(short) if short.is_file() else {}
    batch = params.evaluation.batch_windows
    folder = inputs / f"data/compression/{variant}"
    dtype = agreed_dtype(params.compute.dtype, params.evaluation.device, group.gather)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(params.evaluation.device)

    perplexities: dict[str, tuple[float, list[float]]] = {}
    for name in sorted(tests)[group.share]:
        check_ids(model, tests[name], f"data/sampling/test.safetensors, {name}")
        bar = partial(progress, desc=f"{variant}, {name}", unit="batches", quiet=group.rank > 0)
        perplexities[name] = token_perplexity(model, tests[name], batch, bar, last_windows.get(name))
    together = {name: found for part in group.gather(perplexities) for name, found in part.items()}
    figures = {f"token_perplexity/{name}": perplexity for name, (perplexity, _) in together.items()}
    nats = {name: nats for name, (_, nats) in together.items()}
    tasks, tokenizer = params.evaluation.tasks, AutoTokenizer.from_pretrained(folder)
    bar = partial(progress, desc=f"{variant}, lm-eval", unit="requests", quiet=group.rank > 0)
    figures |= run_tasks(model, tokenizer, inputs / "data/sampling/tasks", tasks, batch, bar)
    if group.rank:
        return

    sizes = {
        "size_ratio": asked.size_ratio,
        "kept_ratio": allocation["kept_ratio"],
        "targeted_parameters": allocation["targeted_parameters"],
        "parameters": count_parameters(model),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    protocol = {
        "dtype": name_of(dtype),
        "lm_eval_max_length": MAX_LENGTH,
        "tasks": list(tasks),
        "test_windows": {name: list(windows.shape) for name, windows in tests.items()},
    }
    if last_windows:
        protocol["last_windows"] = {name: len(window) for name, window in last_windows.items()}
    header = {"variant": variant, "preset": asked.preset, "protocol": protocol}
    results = header | sizes | figures
    write_json(root / "results" / f"{variant}.json", results)
    write_json(root / "data/evaluation" / f"{variant}.json", {"results": results, "nats_by_window": nats})


if __name__ == "__main__":
    run_stage(main)
