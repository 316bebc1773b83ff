"""Allocation: the units of a spectrum and a rule -> a document that says what every matrix is given."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drank.method.allocation.choices import allocate
from drank.method.allocation.units import Allocation, Block, Choice, Unit, loss
from drank.method.precisions import bytes_of
from drank.project.params import Preset, Variant

FIELDS = ("name", "kind", "role", "layer", "out_features", "in_features", "effective_rank", "base_loss")


def allocation(
    variant: str, asked: Variant, preset: Preset, values: Mapping[str, np.ndarray], summary: Mapping[str, Any]
) -> dict[str, Any]:
    """data/allocation/<variant>.json, but for the hashes of its inputs.

    Args:
        values: singular values of a spectrum by file; ``summary`` is its summary.

    Raises:
        InfeasibleBudgetError: the budget does not pay for the least that the rule may choose.
    """
    units = read_units(values, summary)
    given = preset.choices | {"measured": summary.get("sensitivity")}
    header = {"format_version": 1, "variant": variant, "preset": asked.preset}
    choices = preset.choices | asked.model_dump(exclude={"healing"})
    result = describe(units, allocate(units, asked.size_ratio, preset.menu, preset.allocation, given), summary)
    if "precision" in choices:
        _round(result, choices["precision"], choices["group_size"])
    return header | choices | result | {key: summary[key] for key in ("computed_in", "left_dense")}


def _round(document: dict[str, Any], bits: int, group: int) -> None:
    """Add ``bits`` and ``bytes`` to every unit, and their sum."""
    for row in document["units"]:
        size = bytes_of(row["form"], row["out_features"], row["in_features"], row["rank"], bits, group)
        row |= {"bits": bits, "bytes": int(size)}
    document["bytes"] = sum(row["bytes"] for row in document["units"])


def read_units(values: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> list[Unit | Block]:
    """Units and blocks of a spectrum, from its singular values by file and its summary."""

    def unit(row: Mapping[str, Any]) -> Unit:
        return Unit(**{f: row[f] for f in FIELDS}, energies=values[row["factors"]] ** 2)

    blocks = [
        Block(row["name"], tuple(tuple(unit(m) for m in cut["matrices"]) for cut in row["cuts"]))
        for row in summary["blocks"]
    ]
    return [unit(row) for row in summary["units"]] + blocks


def describe(units: Sequence[Unit | Block], allocation: Allocation, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The allocation as a document: totals, ``units`` by layer, ``blocks`` with the channels that they keep."""
    # A block has its matrices at several sizes.
    matrices = summary["units"] + [m for block in summary["blocks"] for cut in block["cuts"] for m in cut["matrices"]]
    sources = {(row["name"], row["out_features"], row["in_features"]): row for row in matrices}
    rows = [
        {
            "name": u.name, "members": source["members"], "factors": source["factors"],
            "kind": u.kind, "role": u.role, "layer": u.layer,
            "out_features": u.out_features, "in_features": u.in_features,
            "form": choice.form, "rank": choice.rank, "full_rank": u.full_rank, "price": choice.price,
            "objective_share": choice.objective_share, "effective_rank": u.effective_rank,
            "relative_loss": _relative_loss(u, choice),
        }
        for u in sorted(allocation.matrices(units), key=lambda u: u.layer)
        for choice in [allocation.choices[u.name]]
        for source in [sources[u.name, u.out_features, u.in_features]]
    ]  # fmt: skip
    blocks = [
        {
            "name": u.name, "channels": kept.in_features, "full_channels": u.cuts[0][-1].in_features,
            "loss": kept.base_loss,
        }
        for u in units if isinstance(u, Block)
        for kept in [u.cuts[allocation.cuts[u.name]][-1]]
    ]  # fmt: skip
    return {
        "objective": {"value": allocation.objective, "bound": allocation.bound, "gap": allocation.gap},
        "budget": allocation.budget, "price": allocation.price, "slack": allocation.budget - allocation.price,
        "kept_ratio": allocation.kept_ratio, "targeted_parameters": allocation.targeted_parameters,
        "units": rows, "blocks": blocks,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The units as CSV, for `dvc plots`, without their members: a list is no cell of a table."""
    text, columns = io.StringIO(), [key for key in rows[0] if key != "members"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _relative_loss(unit: Unit, choice: Choice) -> float:
    """Energy dropped as a share of the unit's; 0 for a matrix of zeros."""
    energy = float(unit.energies.sum()) + unit.base_loss
    return loss(unit, choice) / energy if energy else 0.0
