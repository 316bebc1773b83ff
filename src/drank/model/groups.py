"""Which linears are factored together: groups of consecutive layers, and MLPs that lose channels as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drank.model.linears import PARTS, Linear, in_list

# Matrices that read the residual stream; what they share across layers is a basis of their inputs. Output and down
# projections read what is private to their layer (D-Rank, section 4; Basis Sharing, section 3), and so do those that
# read a latent.
GROUPED_ROLES = (
    "query",
    "key",
    "value",
    "query_key_value",
    "query_latent",
    "key_value_latent",
    "gate",
    "up",
    "gate_up",
)


@dataclass(frozen=True)
class Mlp:
    """An MLP whose channels are rows of ``before`` (gate and up, up alone, or both fused) and columns of ``down``."""

    name: str
    before: tuple[Linear, ...]
    down: Linear

    @property
    def n_channels(self) -> int:
        return self.down.in_features

    def rows(self, linear: Linear, channels: Tensor) -> Tensor:
        """Rows of a matrix of ``before`` that belong to these channels: of a fused one twice as many, gate first."""
        return torch.cat([channels + start for start in range(0, linear.out_features, self.n_channels)])


def find_groups(
    linears: Sequence[Linear], n_layers: int, even_with_grouped_heads: bool = False
) -> list[tuple[Linear, ...]]:
    """Tuples of up to ``n_layers`` linears of one kind and shape in consecutive layers; single ones where none is due.

    Kinds outside GROUPED_ROLES stay single, and so do experts, whose numbers say nothing across layers. So does
    everything where the model has grouped key/value heads (the paper's rule for grouped-query attention), unless
    ``even_with_grouped_heads``. Tuples are in the order of their first linears.
    """
    if has_grouped_heads(linears) and not even_with_grouped_heads:
        n_layers = 1
    groups: list[list[Linear]] = []
    last: dict[tuple[str, int, int], list[Linear]] = {}
    for linear in linears:
        key = linear.kind, linear.out_features, linear.in_features
        group = last.get(key, [])
        follows = bool(group) and len(group) < n_layers and linear.layer == group[-1].layer + 1
        if linear.role in GROUPED_ROLES and follows and not in_list(linear.name):
            group.append(linear)
        else:
            last[key] = [linear]
            groups.append(last[key])
    return [tuple(group) for group in groups]


def has_grouped_heads(linears: Sequence[Linear]) -> bool:
    """True if some layer has fewer key and value heads than query heads, by the widths of its projections: a key
    projection narrower than the query projection, or a fused one narrower than three times the heads' width.

    The heads' width is what the output projection reads or, where that is no target, what the fused projection reads.
    """
    queries = {linear.layer: linear.out_features for linear in linears if linear.role == "query"}
    heads = {linear.layer: linear.in_features for linear in linears if linear.role == "output"}
    return any(
        linear.out_features < queries.get(linear.layer, 0)
        if linear.role == "key"
        else linear.out_features < 3 * heads.get(linear.layer, linear.in_features)
        for linear in linears
        if linear.role in ("key", "query_key_value")
    )


def find_mlps(model: nn.Module, linears: Sequence[Linear]) -> list[Mlp]:
    """MLPs that can lose channels: siblings in one module with roles up and down, perhaps gate, or gate_up and down, of
    fitting sizes.

    Matrices stay single in MLPs of which only a part is targeted, and in those with parameters of another kind for each
    channel: a norm before the down projection, say.
    """
    siblings: dict[str, list[Linear]] = {}
    for linear in linears:
        siblings.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    return [
        Mlp(name, tuple(before), down[0])
        for name, members in siblings.items()
        if (down := [m for m in members if m.role == "down"])
        and (before := [m for m in members if m.role in PARTS])
        and any(m.role in ("up", "gate_up") for m in before)
        and all(m.out_features == PARTS[m.role or ""] * down[0].in_features for m in before)
        and not _others_with_channels(model, name, (*before, down[0]))
    ]


def _others_with_channels(model: nn.Module, name: str, matrices: Sequence[Linear]) -> bool:
    own = {id(parameter) for linear in matrices for parameter in linear.module.parameters()}
    others = [p for p in model.get_submodule(name).parameters() if id(p) not in own]
    return any(matrices[-1].in_features in parameter.shape for parameter in others)
