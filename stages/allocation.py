"""Allocation: the spectrum of a variant's preset, and its size ratio -> data/allocation/<variant>.json."""

from pathlib import Path

import pandas as pd

from drank.allocation import Allocation, Menu, Unit, dense, effective_rank, least_loss, loss, uniform
from drank.workflow.files import file_sha256, read_json, read_tensors, write_json, write_text
from drank.workflow.params import Preset, read_params
from drank.workflow.stage import run_stage


def main(variant: str, root: Path = Path()) -> None:
    asked, preset = read_params(root / "params.yaml").variant(variant)
    folder = root / "data/spectrum" / asked.spectrum
    units = read_units(folder)
    allocation = allocate(units, preset, asked.size_ratio)
    header = {
        "format_version": 1,
        "variant": variant,
        "preset": asked.preset,
        **preset.model_dump(),
        **asked.model_dump(),
    }
    hashes = {name: file_sha256(folder / name) for name in ("singular_values.safetensors", "summary.json")}
    described = describe(units, allocation)
    write_json(root / "data/allocation" / f"{variant}.json", header | described | {"inputs": hashes})
    table = pd.DataFrame(described["units"]).to_csv(index=False, lineterminator="\n")
    write_text(root / "data/allocation" / f"{variant}.csv", table)


def read_units(folder: Path) -> list[Unit]:
    values = read_tensors(folder / "singular_values.safetensors")
    fields = ("name", "kind", "role", "layer", "out_features", "in_features", "effective_rank")
    return [
        Unit(**{f: row[f] for f in fields}, energies=(values[row["name"]] ** 2).numpy())
        for row in read_json(folder / "summary.json")["units"]
    ]


def allocate(units: list[Unit], preset: Preset, size_ratio: float) -> Allocation:
    if preset.allocation == "dense":
        return dense(units)
    menu = Menu(preset.storage, preset.floor, preset.multiple_of)
    if preset.allocation == "uniform":
        return uniform(units, size_ratio, menu)
    if preset.allocation == "least_loss":
        return least_loss(units, size_ratio, menu)
    return effective_rank(units, size_ratio, preset.beta or 0.0, menu)


def describe(units: list[Unit], allocation: Allocation) -> dict:
    rows = [
        {
            "name": u.name, "kind": u.kind, "role": u.role, "layer": u.layer,
            "out_features": u.out_features, "in_features": u.in_features,
            "form": choice.form, "rank": choice.rank, "full_rank": u.full_rank, "price": choice.price,
            "objective_share": choice.objective_share, "effective_rank": u.effective_rank,
            "relative_loss": loss(u, choice) / max(float(u.energies.sum()), 1e-300),
        }
        for u in units
        for choice in [allocation.choices[u.name]]
    ]  # fmt: skip
    totals = {
        "objective": {"value": allocation.objective, "bound": allocation.bound, "gap": allocation.gap},
        "budget": allocation.budget, "price": allocation.price, "slack": allocation.budget - allocation.price,
        "kept_ratio": allocation.kept_ratio, "targeted_parameters": allocation.targeted_parameters,
    }  # fmt: skip
    return totals | {"units": rows}


if __name__ == "__main__":
    run_stage(main)
