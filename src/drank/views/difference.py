"""Differences of two variants: parameters, metrics, ranks, channels. Takes documents; knows no files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from drank.project.tolerance import other_dtypes

Document = Mapping[str, Any]
DEPTHS = 3  # parts that the layers are cut into, where ranks are summed up by depth
SIZES = ("kept_ratio", "price", "targeted_parameters", "parameters", "bytes")
NO_METRICS = frozenset({*SIZES, "size_ratio"})


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared.

    Attributes:
        label: what it is called in messages.
        parameters: values as text by dotted key; None where a key is known to have no value.
        complete: whether those are all parameters. An allocation by itself knows a few only.
        allocation: the document of data/allocation/, or None.
        results: the document of results/, or None.
        base_model: SHA-256 of the base model's files, where it is recorded.
        remarks: what could not be read, and what does not fit together.
    """

    label: str
    parameters: Mapping[str, str | None]
    complete: bool
    allocation: Document | None
    results: Document | None
    base_model: str | None = None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A parameter with two values; None where a side does not have it."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True)
class Figure:
    """A number of either side, such as a metric; None where a side does not have it."""

    name: str
    a: float | int | None
    b: float | int | None

    @property
    def change(self) -> float | int | None:
        """B - A."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def ratio(self) -> float | None:
        """B / A; None where A is 0."""
        return None if self.b is None or not self.a else self.b / self.a


@dataclass(frozen=True)
class Kept:
    """Kept on either side of a matrix (its rank) or of a block (its channels).

    Attributes:
        a, b: what is kept.
        full_a, full_b: what could be. They differ where one side removed channels or shares a basis.
        form_a, form_b: how a matrix is stored ("dense", "factors", "pivot"); "channels" for a block.
    """

    name: str
    kind: str
    layer: int
    a: int
    b: int
    full_a: int
    full_b: int
    form_a: str
    form_b: str

    @property
    def changed(self) -> bool:
        return (self.a, self.form_a) != (self.b, self.form_b)

    @property
    def share(self) -> float:
        """b / full_b - a / full_a, in [-1, 1]."""
        return self.b / self.full_b - self.a / self.full_a


@dataclass(frozen=True)
class Difference:
    """All that was compared. ``parameters`` and ``metrics`` hold what differs, the rest everything that has two sides.

    Attributes:
        only_a, only_b: matrices and blocks that the other side does not have.
        reshaped: those of one name but of two shapes, which come from different models.
        remarks: what could not be compared, and why.
    """

    a: str
    b: str
    parameters: tuple[Parameter, ...]
    metrics: tuple[Figure, ...]
    sizes: tuple[Figure, ...]
    matrices: tuple[Kept, ...]
    blocks: tuple[Kept, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def empty(self) -> bool:
        """Whether nothing that could be compared differs."""
        kept = any(item.changed for item in (*self.matrices, *self.blocks))
        unmatched = self.only_a or self.only_b or self.reshaped
        return not (self.parameters or self.metrics or any(f.change for f in self.sizes) or kept or unmatched)


@dataclass(frozen=True)
class KindSummary:
    """Matrices of one kind, or blocks of one kind, in one row.

    Attributes:
        n, n_changed: how many there are, and how many differ in rank or form.
        mean_a, mean_b: mean rank, or mean number of channels.
        full: the largest full rank.
        by_depth: mean of b - a in each of ``layer_ranges``; None where the kind has no layer there.
        largest: the greatest change of what is kept; None where none changed.
        forms: how often one form became another.
    """

    kind: str
    n: int
    n_changed: int
    mean_a: float
    mean_b: float
    full: int
    by_depth: tuple[float | None, ...]
    largest: Kept | None
    forms: Mapping[tuple[str, str], int]


def compare(a: Side, b: Side) -> Difference:
    """Compare two sides. Matrices are matched by the name of the module, so that groups and single matrices line up.

    Where a side's parameters are not complete, the ones that both record are compared.
    """
    allocations = a.allocation is not None and b.allocation is not None
    matrices, blocks, unmatched, remarks = _kept(a.allocation or {}, b.allocation or {}) if allocations else _NOTHING
    return Difference(
        a=a.label,
        b=b.label,
        parameters=_parameters(a, b),
        metrics=_metrics(a.results, b.results),
        sizes=_sizes(a, b),
        matrices=matrices,
        blocks=blocks,
        only_a=unmatched[0],
        only_b=unmatched[1],
        reshaped=unmatched[2],
        remarks=(*dict.fromkeys((*a.remarks, *b.remarks)), *_protocol(a.results, b.results), *remarks),
    )


def layer_ranges(kept: Sequence[Kept]) -> list[range]:
    """The layers in DEPTHS parts of about equal length, or one part a layer where there are fewer."""
    layers = [item.layer for item in kept]
    if not layers:
        return []
    first, n = min(layers), max(layers) - min(layers) + 1
    parts = min(DEPTHS, n)
    edges = [first + i * n // parts for i in range(parts + 1)]
    return [range(low, high) for low, high in pairwise(edges)]


def by_kind(kept: Sequence[Kept], depths: Sequence[range]) -> list[KindSummary]:
    """One summary a kind, in the order in which kinds first appear."""
    kinds: dict[str, list[Kept]] = {}
    for item in kept:
        kinds.setdefault(item.kind, []).append(item)
    return [_summary(kind, items, depths) for kind, items in kinds.items()]


def text_of(value: Any) -> str:
    """A parameter as text; numbers that are equal have one text, whether they were written 1, 1.0 or 1e0."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(float(value)).removesuffix(".0") if isinstance(value, float) else str(value)
    return str(value)


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Values of a nested document as text by dotted key; keys without a value are left out."""
    if isinstance(value, Mapping):
        rows = (flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items())
        return {dotted: text for row in rows for dotted, text in row.items()}
    return {} if value is None else {key: text_of(value)}


def _parameters(a: Side, b: Side) -> tuple[Parameter, ...]:
    keys = a.parameters.keys() | b.parameters.keys()
    for side in (a, b):
        if not side.complete:
            keys &= side.parameters.keys()
    pairs = [Parameter(key, a.parameters.get(key), b.parameters.get(key)) for key in sorted(keys)]
    if a.base_model and b.base_model:
        pairs.append(Parameter("base_model_sha256", a.base_model, b.base_model))
    return tuple(pair for pair in pairs if pair.a != pair.b)


def _metrics(a: Document | None, b: Document | None) -> tuple[Figure, ...]:
    found = [{key: x for key, x in (side or {}).items() if key not in NO_METRICS and _is_number(x)} for side in (a, b)]
    if not all(found):
        return ()
    names = sorted(found[0].keys() | found[1].keys())
    figures = (Figure(name, found[0].get(name), found[1].get(name)) for name in names)
    return tuple(figure for figure in figures if figure.a != figure.b)


def _sizes(a: Side, b: Side) -> tuple[Figure, ...]:
    # The allocation has the last word, since results of a folder may be those of another evaluation.
    found = [{**(side.results or {}), **(side.allocation or {})} for side in (a, b)]
    return tuple(
        Figure(name, found[0][name], found[1][name])
        for name in SIZES
        if all(_is_number(row.get(name)) for row in found)
    )


def _protocol(a: Document | None, b: Document | None) -> list[str]:
    protocols = [(side or {}).get("protocol", {}) for side in (a, b)]
    before, now = map(flat, protocols)
    differing = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    values = "; ".join(f"{key} is {before[key]} in A and {now[key]} in B" for key in differing)
    remarks = [f"the metrics were measured differently: {values}"] if differing else []
    types = other_dtypes(protocols)
    return [*remarks, types] if types else remarks


@dataclass(frozen=True)
class _Matrix:
    kind: str
    layer: int
    rank: int
    full: int
    form: str
    shape: tuple[int, int]
    members: int
    cut: bool


_Compared = tuple[
    tuple[Kept, ...], tuple[Kept, ...], tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[str]
]
_NOTHING: _Compared = ((), (), ((), (), ()), [])


def _kept(a: Document, b: Document) -> _Compared:
    left, right = _matrices(a), _matrices(b)
    common = [name for name in left if name in right]
    reshaped = [name for name in common if _is_reshaped(left[name], right[name])]
    matrices = [
        Kept(name, x.kind, x.layer, x.rank, y.rank, x.full, y.full, x.form, y.form)
        for name in common
        if name not in reshaped
        for x, y in [(left[name], right[name])]
    ]
    channels, other_shape = _blocks(a, b, matrices)
    shared = sum(left[item.name].members != right[item.name].members for item in matrices)
    remarks = [
        f"{shared} matrices share their basis with other layers on one side: the rank of a shared basis counts for "
        f"each of its layers, and is paid for once"
    ]
    unmatched = (
        tuple(name for name in left if name not in right),
        tuple(name for name in right if name not in left),
        (*reshaped, *other_shape),
    )
    return tuple(matrices), tuple(channels), unmatched, remarks if shared else []


def _matrices(allocation: Document) -> dict[str, _Matrix]:
    """Matrices by the name of their module; the members of a group hold consecutive layers."""
    cut = [f"{row['name']}." for row in allocation.get("blocks", ()) if row["channels"] < row["full_channels"]]
    return {
        name: _Matrix(
            kind=unit["kind"],
            layer=unit["layer"] + offset,
            rank=unit["rank"],
            full=unit["full_rank"],
            form=unit["form"],
            shape=(unit["out_features"], unit["in_features"]),
            members=len(members),
            cut=any(name.startswith(prefix) for prefix in cut),
        )
        for unit in allocation["units"]
        for members in [unit.get("members", [unit["name"]])]
        for offset, name in enumerate(members)
    }


def _is_reshaped(a: _Matrix, b: _Matrix) -> bool:
    """Whether two matrices of one name come from models of different widths: not if channels or a group explain it."""
    return a.shape != b.shape and a.members == b.members and not (a.cut or b.cut)


def _blocks(a: Document, b: Document, matrices: Sequence[Kept]) -> tuple[list[Kept], list[str]]:
    """Channels of either side; a side that knows no blocks but has the block's matrices keeps all of them."""
    left, right = ({row["name"]: row for row in side.get("blocks", ())} for side in (a, b))
    kept, reshaped = [], []
    for name in {**left, **right}:
        layers = [item.layer for item in matrices if item.name.startswith(f"{name}.")]
        x, y = left.get(name), right.get(name)
        full = {row["full_channels"] for row in (x, y) if row}
        if len(full) > 1:
            reshaped.append(name)
        elif layers:
            (width,) = full
            before, now = (row["channels"] if row else width for row in (x, y))
            kind = f"{name.rpartition('.')[2]} channels"
            kept.append(Kept(name, kind, min(layers), before, now, width, width, "channels", "channels"))
    return sorted(kept, key=lambda item: (item.layer, item.name)), reshaped


def _summary(kind: str, items: Sequence[Kept], depths: Sequence[range]) -> KindSummary:
    inside = ([item.b - item.a for item in items if item.layer in depth] for depth in depths)
    largest = max(items, key=lambda item: abs(item.b - item.a))
    return KindSummary(
        kind=kind,
        n=len(items),
        n_changed=sum(item.changed for item in items),
        mean_a=sum(item.a for item in items) / len(items),
        mean_b=sum(item.b for item in items) / len(items),
        full=max(max(item.full_a, item.full_b) for item in items),
        by_depth=tuple(sum(changes) / len(changes) if changes else None for changes in inside),
        largest=largest if largest.a != largest.b else None,
        forms=Counter((item.form_a, item.form_b) for item in items if item.form_a != item.form_b),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
