"""Evaluation: a variant's model, test windows and tasks -> results/<variant>.json, data/evaluation/<variant>.json."""

from pathlib import Path

from drank.model.saved import load
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import JsonLinesFolder, TensorFolder, read_json, write_json
from drank.project.params import read_params
from drank.project.processes import launched, process_group
from drank.steps.evaluation import evaluate, origin


def main(variant: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    params.variant(variant)  # refuses a name that is none
    asked, drawn = params.evaluation, inputs / "data/sampling"
    if launched(asked.processes, "evaluation", variant, root):
        return
    with process_group(asked.threads, asked.device) as group:
        saved = load(inputs / f"data/compression/{variant}", params.compute.dtype, asked.device, group.gather)
        figures, details = evaluate(saved, TensorFolder(drawn), JsonLinesFolder(drawn / "tasks"), asked, group)
        if group.is_first:
            results = figures | origin(read_json(inputs / f"data/allocation/{variant}.json"))
            write_json(root / f"results/{variant}.json", results)
            write_json(root / f"data/evaluation/{variant}.json", details | {"results": results})


if __name__ == "__main__":
    run_stage(main)
