"""Allocation: the spectrum of a variant's preset, and its size ratio -> data/allocation/<variant>.json and .csv."""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import file_sha256, read_arrays, read_json, write_json, write_text
from drank.project.params import read_params
from drank.steps.allocation import allocation, table


def main(variant: str, root: Path = Path()) -> None:
    asked, preset = read_params(root / "params.yaml").variant(variant)
    inputs, folder = Inputs(root), f"data/spectrum/{asked.spectrum}"
    summary, values = (inputs / f"{folder}/{name}" for name in ("summary.json", "singular_values.safetensors"))
    document = allocation(variant, asked, preset, read_arrays(values), read_json(summary))
    document["inputs"] = {file.name: file_sha256(file) for file in (summary, values)}
    write_json(root / "data/allocation" / f"{variant}.json", document)
    write_text(root / "data/allocation" / f"{variant}.csv", table(document["units"]))


if __name__ == "__main__":
    run_stage(main)
