"""Release: a variant's weights, with model card, provenance and checksums -> data/models/<variant>/."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import copy_files, file_sha256, read_json, replacing_folder, write_json, write_text
from drank.project.params import read_params
from drank.steps import release as step


def main(variant: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    parameters, source = params.parameters_of(variant), root / "data/compression" / variant
    results, allocation = (read_json(inputs / f"{place}/{variant}.json") for place in ("results", "data/allocation"))
    config = read_json(source / "config.json")
    weights = [file.name for file in (root / "data/raw/model").glob("*.safetensors")]
    tasks = [file.stem for file in (root / "data/sampling/tasks").glob("*.jsonl")]
    files = {file: file_sha256(inputs / file) for file in step.inputs_of(params, variant, weights, tasks)}
    digests = {file.name: file_sha256(file) for file in (inputs / f"data/compression/{variant}").iterdir()}
    with replacing_folder(root / "data/models" / variant) as folder:
        copy_files(source, folder)
        write_text(folder / step.CARD, step.card(parameters, allocation, results))
        digests[step.CARD] = file_sha256(folder / step.CARD)
        made_of, types = step.made(params, variant, files, allocation, config, results)
        write_json(folder / step.STATEMENT, step.statement(digests, parameters, made_of, results, types))
        digests[step.STATEMENT] = file_sha256(folder / step.STATEMENT)
        write_text(folder / step.CHECKSUMS, step.checksums(digests))


if __name__ == "__main__":
    run_stage(main)
