"""Allocation: the spectrum of a variant's preset, and its size ratio -> data/allocation/<variant>.json."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from drank.method.allocation.asvd import sensitivity, stable_rank_scores
from drank.method.allocation.d_rank_code import released
from drank.method.allocation.rules import (
    Allocation,
    Block,
    Choice,
    Menu,
    Unit,
    dense,
    effective_rank,
    least_loss,
    loss,
    uniform,
)
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import file_sha256, read_arrays, read_json, write_json, write_text
from drank.project.params import Preset, read_params

RATIOS = tuple(i / 100 for i in range(10, 100, 5))  # sizes that the stable-rank variant of ASVD's search may choose


def main(variant: str, root: Path = Path()) -> None:
    asked, preset = read_params(root / "params.yaml").variant(variant)
    inputs, folder = Inputs(root), f"data/spectrum/{asked.spectrum}"
    described, values = inputs / f"{folder}/summary.json", inputs / f"{folder}/singular_values.safetensors"
    summary = read_json(described)
    units = read_units(read_arrays(values), summary)
    allocation = allocate(units, preset, asked.size_ratio, summary.get("sensitivity"))
    header = {
        "format_version": 1,
        "variant": variant,
        "preset": asked.preset,
        **preset.model_dump(),
        **asked.model_dump(),
    }
    hashes = {file.name: file_sha256(file) for file in (described, values)}
    result = describe(units, allocation, rows_by_file(summary)) | {"left_dense": summary["left_dense"]}
    origin = {"computed_in": summary["computed_in"], "inputs": hashes}
    write_json(root / "data/allocation" / f"{variant}.json", header | result | origin)
    write_text(root / "data/allocation" / f"{variant}.csv", table(result["units"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The units as CSV, for `dvc plots`; a list of members is no cell of a table."""
    text, columns = io.StringIO(), [key for key in rows[0] if key != "members"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_units(values: dict[str, np.ndarray], summary: dict[str, Any]) -> list[Unit | Block]:
    fields = ("name", "kind", "role", "layer", "out_features", "in_features", "effective_rank", "base_loss")

    def unit(row: dict[str, Any]) -> Unit:
        return Unit(**{f: row[f] for f in fields}, energies=values[row["factors"]] ** 2)

    blocks = [
        Block(row["name"], tuple(tuple(unit(m) for m in cut["matrices"]) for cut in row["cuts"]))
        for row in summary["blocks"]
    ]
    return [unit(row) for row in summary["units"]] + blocks


def allocate(
    units: list[Unit | Block], preset: Preset, size_ratio: float, measured: dict[str, dict[str, float]] | None
) -> Allocation:
    menu = Menu(preset.storage, preset.floor, preset.cap, preset.dense_option, preset.multiple_of)
    if preset.allocation == "least_loss":
        return least_loss(units, size_ratio, menu)
    matrices = [u for u in units if isinstance(u, Unit)]
    if preset.allocation == "dense":
        return dense(matrices)
    if preset.allocation == "uniform":
        return uniform(matrices, size_ratio, menu)
    if preset.allocation == "released":
        return released(matrices, size_ratio, preset.beta or 0.0, menu)
    if preset.allocation == "sensitivity":
        if preset.scores == "stable_rank":
            return sensitivity(matrices, size_ratio, stable_rank_scores(matrices, RATIOS), menu)
        scores = {name: {float(ratio): s for ratio, s in row.items()} for name, row in (measured or {}).items()}
        return sensitivity(matrices, size_ratio, scores, menu)
    return effective_rank(matrices, size_ratio, preset.beta or 0.0, menu)


def rows_by_file(summary: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Rows of the spectrum by name and shape: a block has its matrices at several sizes."""
    rows = summary["units"] + [m for block in summary["blocks"] for cut in block["cuts"] for m in cut["matrices"]]
    return {(row["name"], row["out_features"], row["in_features"]): row for row in rows}


def describe(units: list[Unit | Block], allocation: Allocation, spectrum: dict) -> dict[str, Any]:
    rows = [
        {
            "name": u.name, "members": source["members"], "factors": source["factors"],
            "kind": u.kind, "role": u.role, "layer": u.layer,
            "out_features": u.out_features, "in_features": u.in_features,
            "form": choice.form, "rank": choice.rank, "full_rank": u.full_rank, "price": choice.price,
            "objective_share": choice.objective_share, "effective_rank": u.effective_rank,
            "relative_loss": relative_loss(u, choice),
        }
        for u in sorted(allocation.matrices(units), key=lambda u: u.layer)
        for choice in [allocation.choices[u.name]]
        for source in [spectrum[u.name, u.out_features, u.in_features]]
    ]  # fmt: skip
    totals = {
        "objective": {"value": allocation.objective, "bound": allocation.bound, "gap": allocation.gap},
        "budget": allocation.budget, "price": allocation.price, "slack": allocation.budget - allocation.price,
        "kept_ratio": allocation.kept_ratio, "targeted_parameters": allocation.targeted_parameters,
    }  # fmt: skip
    blocks = [
        {
            "name": u.name,
            "channels": u.cuts[cut][-1].in_features,
            "full_channels": u.cuts[0][-1].in_features,
            "loss": u.cuts[cut][-1].base_loss,
        }
        for u in units
        if isinstance(u, Block)
        for cut in [allocation.cuts[u.name]]
    ]
    return totals | {"units": rows, "blocks": blocks}


def relative_loss(unit: Unit, choice: Choice) -> float:
    """Energy dropped as a share of the unit's; 0 for a matrix of zeros."""
    energy = float(unit.energies.sum()) + unit.base_loss
    return loss(unit, choice) / energy if energy else 0.0


if __name__ == "__main__":
    run_stage(main)
