"""data/sampling/: calibration windows, test windows and offline task items, from raw texts and a tokenizer."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import JsonLinesFolder, TensorFolder, replacing_folder, write_json
from drank.project.params import read_params
from drank.project.texts import Text
from drank.steps.sampling import sample


def main(root: Path = Path()) -> None:
    from transformers import AutoConfig, AutoTokenizer

    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    base = inputs / "data/raw/model"
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    texts = {name: Text(inputs / f"data/raw/text/{name}.jsonl", tokenizer) for name in params.text}
    with replacing_folder(root / "data/sampling") as folder:
        stores = TensorFolder(folder), JsonLinesFolder(folder / "tasks")
        summary = sample(texts, tokenizer, config, params.sampling, params.evaluation.tasks, *stores)
        write_json(folder / "summary.json", summary)


if __name__ == "__main__":
    run_stage(main)
