"""Release: a variant's weights, with model card, provenance and checksums -> data/models/<variant>/."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import copy_files, file_sha256, read_json, replacing_folder, write_json, write_text
from drank.project.params import read_params
from drank.steps.release import CARD, CHECKSUMS, SERVED, STATEMENT, card, checksums, inputs_of, mlmodel, statement


def main(variant: str, root: Path = Path()) -> None:
    parameters, inputs = read_params(root / "params.yaml").parameters_of(variant), Inputs(root)
    source, raw = inputs / f"data/compression/{variant}", (root / "data/raw/model").glob("*.safetensors")
    there = [file.relative_to(root).as_posix() for file in (*raw, *(root / "data/sampling/tasks").glob("*.jsonl"))]
    files = {file: file_sha256(inputs / file) for file in inputs_of(parameters, there)}
    results, allocation = (read_json(inputs / f"{place}/{variant}.json") for place in ("results", "data/allocation"))
    digests = {file.name: file_sha256(file) for file in source.iterdir()}
    with replacing_folder(root / "data/models" / variant) as folder:
        copy_files(source, folder)
        for name, text in {CARD: card(parameters, allocation, results), SERVED: mlmodel()}.items():
            write_text(folder / name, text)
            digests[name] = file_sha256(folder / name)
        made = statement(parameters, digests, files, allocation, results, read_json(source / "config.json"))
        write_json(folder / STATEMENT, made)
        write_text(folder / CHECKSUMS, checksums(digests | {STATEMENT: file_sha256(folder / STATEMENT)}))


if __name__ == "__main__":
    run_stage(main)
