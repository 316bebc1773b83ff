"""Allocation: the spectrum of a variant's preset, and its size ratio -> data/allocation/<variant>.json."""

from pathlib import Path

from drank.method.allocation.choices import allocate
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import file_sha256, read_arrays, read_json, write_json, write_text
from drank.project.params import read_params
from drank.steps.allocation import describe, read_units, table


def main(variant: str, root: Path = Path()) -> None:
    asked, preset = read_params(root / "params.yaml").variant(variant)
    inputs, folder = Inputs(root), f"data/spectrum/{asked.spectrum}"
    described, values = inputs / f"{folder}/summary.json", inputs / f"{folder}/singular_values.safetensors"
    summary = read_json(described)
    units = read_units(read_arrays(values), summary)
    given = preset.model_dump() | {"measured": summary.get("sensitivity")}
    result = describe(units, allocate(units, asked.size_ratio, preset.menu, preset.allocation, given), summary)
    header = {"format_version": 1, "variant": variant, "preset": asked.preset}
    choices = preset.model_dump() | asked.model_dump(exclude={"healing"})
    origin = {
        "computed_in": summary["computed_in"],
        "inputs": {file.name: file_sha256(file) for file in (described, values)},
        "left_dense": summary["left_dense"],
    }
    write_json(root / "data/allocation" / f"{variant}.json", header | choices | result | origin)
    write_text(root / "data/allocation" / f"{variant}.csv", table(result["units"]))


if __name__ == "__main__":
    run_stage(main)
