"""Differences of two variants as a JSON document, which tables and the picture are made of. Knows no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from drank.project.documents import AllocationDocument, Results
from drank.project.state import flat
from drank.project.tolerance import other_dtypes
from drank.views.matrices import CHANNELS, by_layer, matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = dict[str, Any]


class DifferenceError(ValueError):
    """A side of the comparison is not there, or has no ranks to draw; the message says what was looked for."""


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared; None where it is not known. The label names it in messages."""

    label: str
    parameters: Mapping[str, Any] | None
    allocation: AllocationDocument | None
    results: Results | None


def compare(a: Side, b: Side) -> Document:
    """Compare two sides; what one of them does not know is not compared, and remarked.

    ``parameters`` and ``figures`` hold what differs, ``units`` every matrix and MLP that both have, ``kinds`` their
    sums. Matrices are matched by the names of their modules, so that shared bases and single matrices line up.
    """
    found: Document = {key: {} for key in ("parameters", "units", "kinds")} | {"only_a": [], "only_b": []}
    if a.parameters is not None and b.parameters is not None:
        left, right = (flat(side.parameters) | {"variant.name": ""} for side in (a, b))
        found["parameters"] = _differing(left, right)
    figures: tuple[Document, Document] = (a.results.figures, b.results.figures) if a.results and b.results else ({}, {})
    if a.allocation and b.allocation:
        for values, allocation in zip(figures, (a.allocation, b.allocation), strict=True):
            values.update(kept_ratio=allocation.kept_ratio, price=allocation.price)
        found |= _units(*(matrices(allocation.model_dump()) for allocation in (a.allocation, b.allocation)))
    found["figures"] = {name: _with_change(**pair) for name, pair in _differing(*figures).items()}
    changed = any(row["n_changed"] for row in found["kinds"].values())
    empty = not (changed or any(found[key] for key in ("parameters", "figures", "only_a", "only_b")))
    types = other_dtypes(side.results.protocol for side in (a, b) if side.results)
    remarks = [*dict.fromkeys((*_remarks(a), *_remarks(b), *([types] if types else [])))]
    return found | {"a": a.label, "b": b.label, "empty": empty, "remarks": remarks}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = sorted(a.keys() | b.keys())
    return {name: {"a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)}


def _with_change(a: int | float | None, b: int | float | None) -> dict[str, int | float | None]:
    if a is None or b is None:
        return {"a": a, "b": b, "change": None, "ratio": None}
    return {"a": a, "b": b, "change": b - a, "ratio": b / a if a else None}


def _remarks(side: Side) -> list[str]:
    """Parts that are not known, and sizes beside an allocation that was made with others."""
    parts = {"parameters (of this version)": side.parameters, "ranks": side.allocation, "metrics": side.results}
    found = [f"{side.label}: no {part} there, so none compared" for part, known in parts.items() if known is None]
    if side.allocation:
        asked = (side.parameters or {}).get("variant", {})
        found += [
            f"{side.label}: {key} is {asked[key]}, but its allocation was made with {used}; run `dvc repro`"
            for key in ("preset", "spectrum", "size_ratio", "bytes_ratio", "megabytes")
            if (used := getattr(side.allocation, key)) != asked.get(key, used)
        ]
    return found


def _units(a: pd.DataFrame, b: pd.DataFrame) -> Document:
    """The rows of both sides by name, joined, and the names that one of them lacks."""
    a, b = _with_channels(a, b), _with_channels(b, a)
    both = a.index.intersection(b.index, sort=False)
    left, right = a.loc[both], b.loc[both]
    units = left[["kind", "layer"]].assign(
        a=left["rank"], b=right["rank"], full_a=left["full_rank"], full_b=right["full_rank"],
        form_a=left["form"], form_b=right["form"],
    )  # fmt: skip
    units["share"] = units["b"] / units["full_b"] - units["a"] / units["full_a"]
    return {
        "units": units.to_dict("index"),
        "kinds": _by_kind(units),
        "only_a": a.index.difference(b.index, sort=False).tolist(),
        "only_b": b.index.difference(a.index, sort=False).tolist(),
    }


def _with_channels(rows: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Add the other side's MLPs whole: a side whose method removes no channels keeps them all."""
    added = other[(other["form"] == CHANNELS) & ~other.index.isin(rows.index)]
    return pd.concat([rows, added.assign(rank=added["full_rank"])])


def _by_kind(units: pd.DataFrame) -> Document:
    """One summary per kind, in the order in which kinds first appear."""
    found = {}
    for kind, rows in units.groupby("kind", sort=False):
        change, reshaped = rows["b"] - rows["a"], rows["form_a"] != rows["form_b"]
        found[str(kind)] = {
            "n": len(rows),
            "n_changed": int((change.ne(0) | reshaped).sum()),
            "full": max(*rows["full_a"].tolist(), *rows["full_b"].tolist()),
            "mean_a": float(rows["a"].mean()),
            "mean_b": float(rows["b"].mean()),
            "least_change": int(change.min()),
            "greatest_change": int(change.max()),
            "forms": ", ".join(sorted(set((rows["form_a"] + " to " + rows["form_b"])[reshaped]))),
        }
    return found


def heat_map(differences: Iterable[Document]) -> "Figure":
    """Change of rank / full rank by layer (down) and kind (across), a panel per comparison; blue is more in B.

    Raises:
        DifferenceError: no matrix has a rank on both sides of any.
    """
    from matplotlib.colors import Normalize

    from drank.views.pictures import heat_maps

    panels = {
        f"A  {found['a']}": (f"B  {found['b']}", by_layer(pd.DataFrame(found["units"].values()), "share", "mean"))
        for found in differences
        if found["units"]
    }
    if not panels:
        raise DifferenceError("not drawn: no matrix has a rank on both sides; without --picture, diff says why")
    limit = max(float(np.nanmax(table.abs())) for _, table in panels.values()) or 1.0
    return heat_maps(panels, "RdBu", Normalize(-limit, limit), "B - A, share of the full rank, or of the channels")
