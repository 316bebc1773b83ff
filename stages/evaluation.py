"""Evaluation: a variant's model, test windows and tasks -> results/<variant>.json, data/evaluation/<variant>.json."""

from pathlib import Path

from transformers import AutoTokenizer

import drank.model.quantizer  # noqa: F401  the format of data/compression, seen by DVC's dependencies
from drank.model.lora import CURVE
from drank.model.precision import agreed_dtype, load_model
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import JsonLinesFolder, read_json, read_tensors, write_json
from drank.project.params import read_params
from drank.project.processes import launched, process_group
from drank.steps.evaluation import evaluate

OF_ALLOCATION = ("variant", "preset", "kept_ratio", "targeted_parameters")


def main(variant: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    chosen, asked = params.variant(variant)[0], params.evaluation
    if launched(asked.processes, "evaluation", variant, root):
        return
    with process_group(asked.threads, asked.device) as group:
        tests, short = (inputs / f"data/sampling/{name}.safetensors" for name in ("test", "last"))
        windows, last = read_tensors(tests), read_tensors(short) if short.is_file() else {}
        folder, tasks = inputs / f"data/compression/{variant}", JsonLinesFolder(inputs / "data/sampling/tasks")
        dtype = agreed_dtype(params.compute.dtype, asked.device, group.gather)
        model = load_model(folder, dtype, asked.device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        figures, nats = evaluate(model, tokenizer, windows, last, tasks, asked, group)
        if not group.is_first:
            return
        allocation = read_json(inputs / f"data/allocation/{variant}.json")
        results = figures | {key: allocation[key] for key in OF_ALLOCATION} | chosen.size
        if bits := {unit["bits"] for unit in allocation["units"] if "bits" in unit}:
            results["bits"] = bits.pop() if len(bits) == 1 else "mixed"
        results["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        write_json(root / "results" / f"{variant}.json", results)
        curve = {"loss_curve": read_json(folder / CURVE)} if chosen.healing else {}
        write_json(root / f"data/evaluation/{variant}.json", {"results": results, "nats_by_window": nats} | curve)


if __name__ == "__main__":
    run_stage(main)
