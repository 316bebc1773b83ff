"""What differs between two variants, as a JSON document that tables and the picture are made of. Knows no files."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from drank.project.documents import AllocationDocument, Results
from drank.project.tolerance import other_dtypes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = dict[str, Any]
DEPTHS = 3  # parts that the layers are cut into, where ranks are summed up by depth
PANELS_ACROSS = 5


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared.

    Attributes:
        label: what it is called in messages.
        parameters: values as text by dotted key; None where they are not known.
        remarks: what could not be read, and what does not fit together.
    """

    label: str
    parameters: Mapping[str, str] | None
    allocation: AllocationDocument | None
    results: Results | None
    remarks: tuple[str, ...] = ()


class Kept(NamedTuple):
    """The rank of a matrix, or the channels of a block (form "channels"), and how much it could be."""

    kind: str
    layer: int
    kept: int
    full: int
    form: str


def compare(a: Side, b: Side) -> Document:
    """Compare two sides; what one of them does not know is not compared.

    ``parameters`` and ``figures`` hold what differs, ``units`` every matrix and block that both have, ``kinds`` their
    sums. Matrices are matched by the names of their modules, so that shared bases and single matrices line up.
    """
    found: Document = {"a": a.label, "b": b.label, "parameters": {}, "units": {}, "only_a": [], "only_b": []}
    if a.parameters is not None and b.parameters is not None:
        found["parameters"] = _differing(a.parameters, b.parameters)
    found["figures"] = {name: pair | _change(**pair) for name, pair in _differing(*_figures(a, b)).items()}
    if a.allocation and b.allocation:
        left, right = _kept(a.allocation), _kept(b.allocation)
        # A side whose method removes no channels has no blocks: it keeps them all.
        left |= {name: row._replace(kept=row.full) for name, row in _blocks(right) if name not in left}
        right |= {name: row._replace(kept=row.full) for name, row in _blocks(left) if name not in right}
        found["units"] = {name: _unit(row, right[name]) for name, row in left.items() if name in right}
        found["only_a"] = [name for name in left if name not in right]
        found["only_b"] = [name for name in right if name not in left]
    found["kinds"] = _by_kind(list(found["units"].values()))
    types = other_dtypes(side.results.protocol for side in (a, b) if side.results)
    found["remarks"] = [*dict.fromkeys((*a.remarks, *b.remarks)), *([types] if types else [])]
    changed = any(row["n_changed"] for row in found["kinds"].values())
    found["empty"] = not (changed or any(found[key] for key in ("parameters", "figures", "only_a", "only_b")))
    return found


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = sorted(a.keys() | b.keys())
    return {name: {"a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)}


def _figures(a: Side, b: Side) -> list[dict[str, int | float]]:
    found: list[dict[str, int | float]] = [{}, {}]
    if a.results and b.results:
        found = [a.results.figures, b.results.figures]
    if a.allocation and b.allocation:
        for figures, side in zip(found, (a.allocation, b.allocation), strict=True):
            figures |= {"kept_ratio": side.kept_ratio, "price": side.price}
    return found


def _change(a: float | int | None, b: float | int | None) -> dict[str, float | int | None]:
    if a is None or b is None:
        return {"change": None, "ratio": None}
    return {"change": b - a, "ratio": b / a if a else None}


def _kept(allocation: AllocationDocument) -> dict[str, Kept]:
    """Matrices by the name of their module, and blocks; the members of a shared basis hold consecutive layers."""
    layers = {unit.name.rpartition(".")[0]: unit.layer for unit in allocation.units}
    matrices = {
        name: Kept(unit.kind, unit.layer + offset, unit.rank, unit.full_rank, unit.form)
        for unit in allocation.units
        for offset, name in enumerate(unit.members)
    }
    return matrices | {
        row.name: Kept(f"{row.name.rpartition('.')[2]} channels", layer, row.channels, row.full_channels, "channels")
        for row in allocation.blocks
        if (layer := layers.get(row.name)) is not None
    }


def _blocks(rows: Mapping[str, Kept]) -> list[tuple[str, Kept]]:
    return [(name, row) for name, row in rows.items() if row.form == "channels"]


def _unit(a: Kept, b: Kept) -> Document:
    return {
        "kind": a.kind, "layer": a.layer, "a": a.kept, "b": b.kept, "full_a": a.full, "full_b": b.full,
        "form_a": a.form, "form_b": b.form, "share": b.kept / b.full - a.kept / a.full,
    }  # fmt: skip


def _by_kind(units: Sequence[Document]) -> dict[str, Document]:
    """One summary per kind, in the order in which kinds first appear."""
    kinds: dict[str, list[Document]] = {}
    for unit in units:
        kinds.setdefault(unit["kind"], []).append(unit)
    return {kind: _summary(rows, _depths(units)) for kind, rows in kinds.items()}


def _depths(units: Sequence[Document]) -> list[range]:
    """The layers in DEPTHS parts of about equal length, or one part per layer where there are fewer."""
    first = min(unit["layer"] for unit in units)
    n = max(unit["layer"] for unit in units) - first + 1
    parts = min(DEPTHS, n)
    return [range(*edges) for edges in pairwise([first + i * n // parts for i in range(parts + 1)])]


def _summary(rows: Sequence[Document], depths: Sequence[range]) -> Document:
    largest = max(rows, key=lambda row: abs(row["b"] - row["a"]))
    forms = Counter(f"{row['form_a']} to {row['form_b']}" for row in rows if row["form_a"] != row["form_b"])
    return {
        "n": len(rows),
        "n_changed": sum((row["a"], row["form_a"]) != (row["b"], row["form_b"]) for row in rows),
        "full": max(max(row["full_a"], row["full_b"]) for row in rows),
        "mean_a": _mean(row["a"] for row in rows),
        "mean_b": _mean(row["b"] for row in rows),
        "mean_change_by_layers": {
            f"{depth[0]}-{depth[-1]}": _mean(row["b"] - row["a"] for row in rows if row["layer"] in depth)
            for depth in depths
        },
        "largest": largest if largest["a"] != largest["b"] else None,
        "forms": dict(sorted(forms.items())),
    }


def _mean(values: Iterable[int]) -> float | None:
    """None of nothing: a kind may have no layer in a part of the depth."""
    found = list(values)
    return sum(found) / len(found) if found else None


def heat_map(differences: Sequence[Document]) -> "Figure":
    """Change of rank / full rank by layer (down) and kind (across), a panel per comparison; blue is more in B.

    Dots mark the matrices that one side alone keeps dense. Grey was not compared.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(len(differences), PANELS_ACROSS)
    rows = -(-len(differences) // columns)
    figure = Figure(figsize=(2.2 + 3.2 * columns, 1 + 5.5 * rows), layout="constrained")
    limit = max(abs(unit["share"]) for found in differences for unit in found["units"].values()) or 1.0
    shades = colormaps["RdBu"].with_extremes(bad="lightgrey")
    for index, found in enumerate(differences):
        axes = figure.add_subplot(rows, columns, index + 1)
        kinds, units = list(found["kinds"]), list(found["units"].values())
        grid = np.full((max(unit["layer"] for unit in units) + 1, len(kinds)), np.nan)
        for unit in units:
            grid[unit["layer"], kinds.index(unit["kind"])] = unit["share"]
        image = axes.imshow(grid, cmap=shades, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        for one, other, face, edge in (("a", "b", "none", "black"), ("b", "a", "black", "white")):
            dense = [u for u in units if u[f"form_{one}"] == "dense" != u[f"form_{other}"]]
            points = [kinds.index(unit["kind"]) for unit in dense], [unit["layer"] for unit in dense]
            label = f"dense in {one.upper()} only"
            axes.scatter(*points, s=20, facecolors=face, edgecolors=edge, linewidths=0.8, label=label)
        axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds], rotation=90)
        axes.set_title(f"A  {found['a']}\nB  {found['b']}", fontsize=9, loc="left")
        axes.set_ylabel("layer" if index % columns == 0 else "")
    figure.colorbar(image, ax=figure.axes, label="B - A, share of the full rank, or of the channels")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure
