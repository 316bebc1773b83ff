"""Release: a variant's weights, with model card, provenance and checksums -> data/models/<variant>/."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import copy_files, file_sha256, read_json, replacing_folder, write_json, write_text
from drank.project.params import read_params
from drank.steps.release import CARD, CHECKSUMS, STATEMENT, card, checksums, inputs_of, materials, statement


def main(variant: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    parameters, allocation = params.parameters_of(variant), read_json(inputs / f"data/allocation/{variant}.json")
    results, source = read_json(inputs / f"results/{variant}.json"), inputs / f"data/compression/{variant}"
    provenance = read_json(source / "config.json").get("quantization_config", {}).get("provenance", {})
    healed_in = {"healing": provenance["healed_in"]} if "healed_in" in provenance else {}
    types = allocation["computed_in"] | healed_in | {"evaluation": results["protocol"]["dtype"]}
    weights = [file.name for file in (inputs / "data/raw/model").glob("*.safetensors")]
    tasks = [file.stem for file in (root / "data/sampling/tasks").glob("*.jsonl")]
    files = {file: file_sha256(inputs / file) for file in inputs_of(params, variant, weights, tasks)}
    made_of = materials(params, variant, files, allocation, provenance.get("healed_from_sha256"))
    with replacing_folder(root / "data/models" / variant) as folder:
        copy_files(source, folder)
        write_text(folder / CARD, card(parameters, allocation, results))
        digests = {file.name: file_sha256(file) for file in folder.iterdir()}
        write_json(folder / STATEMENT, statement(digests, parameters, made_of, results, types))
        write_text(folder / CHECKSUMS, checksums(digests | {STATEMENT: file_sha256(folder / STATEMENT)}))


if __name__ == "__main__":
    run_stage(main)
