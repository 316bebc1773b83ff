"""Which linears are factored together: groups of consecutive layers, and MLPs that lose channels as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from drank.language_model.linears import Linear

# Matrices that read the residual stream; what they share across layers is a basis of their inputs. Output and down
# projections read what is private to their layer (D-Rank, section 4; Basis Sharing, section 3).
GROUPED_ROLES = ("query", "key", "value", "query_key_value", "gate", "up", "gate_up")


@dataclass(frozen=True)
class Mlp:
    """An MLP whose channels are rows of ``before`` (gate and up, or up alone) and columns of ``down``."""

    name: str
    before: tuple[Linear, ...]
    down: Linear

    @property
    def n_channels(self) -> int:
        return self.down.in_features


def find_groups(
    linears: Sequence[Linear], n_layers: int, even_with_grouped_heads: bool = False
) -> list[tuple[Linear, ...]]:
    """Tuples of up to ``n_layers`` linears of one kind and shape in consecutive layers; single ones where none is due.

    Kinds outside GROUPED_ROLES stay single. So does everything where the model has grouped key/value heads (the paper's
    rule for grouped-query attention), unless ``even_with_grouped_heads``. In the order of the
    tuples' first linears.
    """
    if has_grouped_heads(linears) and not even_with_grouped_heads:
        n_layers = 1
    runs: dict[tuple[str, int, int], list[Linear]] = {}
    groups: list[tuple[Linear, ...]] = []
    for linear in linears:
        if linear.role not in GROUPED_ROLES:
            groups.append((linear,))
            continue
        run = runs.setdefault((linear.kind, linear.out_features, linear.in_features), [])
        if run and (len(run) == n_layers or linear.layer != run[-1].layer + 1):
            groups.append(tuple(run))
            run.clear()
        run.append(linear)
    groups += [tuple(run) for run in runs.values() if run]
    position = {linear.name: i for i, linear in enumerate(linears)}
    return sorted(groups, key=lambda group: position[group[0].name])


def has_grouped_heads(linears: Sequence[Linear]) -> bool:
    """Whether some key projection is narrower than the query projection of its layer."""
    widths = {(linear.layer, linear.role): linear.out_features for linear in linears}
    return any(width < widths.get((layer, "query"), width) for (layer, role), width in widths.items() if role == "key")


def find_mlps(linears: Sequence[Linear]) -> list[Mlp]:
    """MLPs that can lose channels: siblings in one module with roles up and down, perhaps gate, of fitting sizes.

    A fused gate and up projection, or an MLP of which only a part is targeted, is none; its matrices stay single.
    """
    siblings: dict[str, list[Linear]] = {}
    for linear in linears:
        siblings.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    return [
        Mlp(name, tuple(before), down[0])
        for name, members in siblings.items()
        if (down := [m for m in members if m.role == "down"])
        and (before := [m for m in members if m.role in ("gate", "up")])
        and any(m.role == "up" for m in before)
        and all(m.out_features == down[0].in_features for m in before)
    ]
