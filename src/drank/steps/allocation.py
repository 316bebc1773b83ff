"""Allocation: the units of a spectrum and a rule -> a document that says what every matrix is given."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from drank.method.allocation.choices import allocate
from drank.method.allocation.knapsack import InfeasibleBudgetError
from drank.method.allocation.units import DEFAULT, Allocation, Block, Choice, Menu, Unit, budget_of, loss
from drank.method.precisions import FULL, bytes_of, embedding_bytes
from drank.project.params import Preset, Variant

HEADER = 1000  # bytes per matrix for what a safetensors file says of its tensors, eight of 120 bytes at most
OF_UNIT = ("name", "kind", "role", "layer", "out_features", "in_features", "effective_rank", "base_loss")


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
    given = preset.choices | {"measured": summary.get("sensitivity"), "divergence": summary.get("divergence")}
    header = {"format_version": 1, "variant": variant, "preset": asked.preset}
    choices = preset.choices | asked.model_dump(exclude={"healing"}, exclude_none=True)
    menu = replace(preset.menu, in_bytes=asked.in_bytes)
    if preset.precision == "mixed":
        measured = {bits for unit in units for cut in unit.cuts for matrix in cut for bits in matrix.rounding}
        menu = replace(menu, bits=(*sorted(measured), FULL))
    # Megabytes are of all weight files, and those of other matrices are not for sale.
    whole, outside = budget_of(units, 1.0, in_bytes=asked.in_bytes), 0
    if asked.megabytes is not None:
        outside = _bytes_outside(preset, summary)
    ((key, size),) = asked.size.items()
    share = size if asked.megabytes is None else (size * 1e6 - outside) / whole
    try:
        found = allocate(units, share, menu, preset.allocation, given)
    except InfeasibleBudgetError as error:
        if not asked.in_bytes or error.least is None:
            raise
        nearest = error.least / whole if asked.megabytes is None else (error.least + outside) / 1e6
        raise InfeasibleBudgetError(
            f"{key} {size}: the smallest matrices on offer take {error.least} bytes, more than is left; raise {key} to "
            f"{math.ceil(nearest * 1e4) / 1e4:.4f}"
        ) from None
    result = describe(units, found, summary, menu)
    return header | choices | result | {key: summary[key] for key in ("computed_in", "left_dense")}


def _bytes_outside(preset: Preset, summary: Mapping[str, Any]) -> int:
    """Bytes of the weight files that no budget of the linears can change."""
    rest, rows = summary["rest"], summary["units"] + [block for block in summary["blocks"] for _ in range(3)]
    embeddings = sum(embedding_bytes(n, d, preset.embedding_bits or FULL) for n, d in rest["embeddings"])
    return embeddings + rest["others"] * FULL // 8 + HEADER * len(rows)


def read_units(values: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> list[Unit | Block]:
    """Units and blocks of a spectrum, from its singular values by file and its summary."""

    def unit(row: Mapping[str, Any]) -> Unit:
        rounding = {int(bits): lost for bits, lost in row.get("rounding", {}).items()}
        return Unit(**{key: row[key] for key in OF_UNIT}, energies=values[row["factors"]] ** 2, rounding=rounding)

    blocks = [
        Block(row["name"], tuple(tuple(unit(m) for m in cut["matrices"]) for cut in row["cuts"]))
        for row in summary["blocks"]
    ]
    return [unit(row) for row in summary["units"]] + blocks


def describe(
    units: Sequence[Unit | Block], allocation: Allocation, summary: Mapping[str, Any], menu: Menu = DEFAULT
) -> dict[str, Any]:
    """The allocation as a document: totals, ``units`` by layer, ``blocks`` with the channels that they keep.

    Bits and bytes are there where the menu has bits below 16, or its budget is one of bytes.
    """
    counts_bytes = menu.in_bytes or menu.bits != (FULL,)
    # A block has its matrices at several sizes.
    matrices = summary["units"] + [m for block in summary["blocks"] for cut in block["cuts"] for m in cut["matrices"]]
    sources = {(row["name"], row["out_features"], row["in_features"]): row for row in matrices}
    rows = []
    for u in sorted(allocation.matrices(units), key=lambda u: u.layer):
        choice, source = allocation.choices[u.name], sources[u.name, u.out_features, u.in_features]
        row = {
            "name": u.name, "members": source["members"], "factors": source["factors"],
            "kind": u.kind, "role": u.role, "layer": u.layer,
            "out_features": u.out_features, "in_features": u.in_features,
            "form": choice.form, "rank": choice.rank, "full_rank": u.full_rank, "price": choice.price,
            "objective_share": choice.objective_share, "effective_rank": u.effective_rank,
            "relative_loss": _relative_loss(u, choice),
        }  # fmt: skip
        if counts_bytes:
            size = bytes_of(choice.form, u.out_features, u.in_features, choice.rank, choice.bits, menu.group)
            row |= {"bits": choice.bits, "bytes": size}
        rows.append(row)
    blocks = [
        {
            "name": u.name, "channels": kept.in_features, "full_channels": u.cuts[0][-1].in_features,
            "loss": kept.base_loss,
        }
        for u in units if isinstance(u, Block)
        for kept in [u.cuts[allocation.cuts[u.name]][-1]]
    ]  # fmt: skip
    totals = {"bytes": sum(row["bytes"] for row in rows)} if counts_bytes else {}
    if allocation.bytes_budget is not None:
        totals["bytes_budget"] = allocation.bytes_budget
    return {
        "objective": {"value": allocation.objective, "bound": allocation.bound, "gap": allocation.gap},
        "budget": allocation.budget, "price": allocation.price, "slack": allocation.budget - allocation.price,
        "kept_ratio": allocation.kept_ratio, "targeted_parameters": allocation.targeted_parameters, **totals,
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
