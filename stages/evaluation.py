"""Evaluation: a variant's model, test windows and tasks -> results/<variant>.json, data/evaluation/<variant>.json."""

from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import drank.language_model.plugin  # noqa: F401  the format of data/compression, seen by DVC's dependencies
from drank.evaluation import MAX_LENGTH, count_parameters, run_tasks
from drank.perplexity import token_perplexity
from drank.workflow.files import read_json, read_tensors, write_json
from drank.workflow.params import read_params
from drank.workflow.stage import run_stage


def main(variant: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    asked, _ = params.variant(variant)
    allocation = read_json(root / "data/allocation" / f"{variant}.json")
    tests = read_tensors(root / "data/sampling/test.safetensors")
    torch.set_num_threads(params.evaluation.threads)
    batch = params.evaluation.batch_windows
    folder = root / "data/compression" / variant
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    figures: dict[str, float] = {}
    nats: dict[str, list[float]] = {}
    for name, windows in tests.items():
        bar = partial(tqdm, desc=f"{variant}, {name}", unit="batch")
        figures[f"token_perplexity/{name}"], nats[name] = token_perplexity(model, windows, batch, bar)
    tasks, tokenizer = params.evaluation.tasks, AutoTokenizer.from_pretrained(folder)
    figures |= run_tasks(model, tokenizer, root / "data/sampling/tasks", tasks, batch)

    sizes = {
        "size_ratio": asked.size_ratio,
        "kept_ratio": allocation["kept_ratio"],
        "targeted_parameters": allocation["targeted_parameters"],
        "parameters": count_parameters(model),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }
    protocol = {
        "dtype": "bfloat16",
        "lm_eval_max_length": MAX_LENGTH,
        "tasks": list(tasks),
        "test_windows": {name: list(windows.shape) for name, windows in tests.items()},
    }
    header = {"variant": variant, "preset": asked.preset, "protocol": protocol}
    results = header | sizes | figures
    write_json(root / "results" / f"{variant}.json", results)
    write_json(root / "data/evaluation" / f"{variant}.json", {"results": results, "nats_by_window": nats})


if __name__ == "__main__":
    run_stage(main)
