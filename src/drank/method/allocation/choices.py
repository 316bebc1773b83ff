"""The table of allocation rules, whose rows params.yaml may name.

``accepts`` names the parameters that a rule reads. params.yaml is checked against it, so that no parameter is ignored.
docs/extending.md adds a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from drank.method.allocation.asvd import sensitivity, stable_rank_scores
from drank.method.allocation.d_rank_code import released
from drank.method.allocation.rules import dense, effective_rank, least_loss, lems, uniform
from drank.method.allocation.units import PRICES, Allocation, Block, Menu, Unit
from drank.method.precisions import FULL, GROUP

Given = Mapping[str, Any]  # parameters by name, at least those that a row accepts
RATIOS = tuple(i / 100 for i in range(10, 100, 5))  # sizes that the stable-rank variant of ASVD's search may choose


@dataclass(frozen=True)
class Rule:
    """How ranks are allocated.

    Attributes:
        allocate: (units, size_ratio, menu, given) -> an allocation; ``given`` has the parameters that the rule accepts
            and, under ``measured`` and ``divergence``, perplexities and divergences by matrix and ratio, or None.
        accepts: parameters of section ``presets`` that the rule reads, the menu's among them.
        blocks: True allows MLPs that lose channels among the units.
        storages: forms that the rule can price.
        in_bytes: True takes budgets in bytes, and bits that compete with ranks.
    """

    allocate: "Callable[[Sequence[Any], float, Menu, Given], Allocation]"
    accepts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    blocks: bool = False
    storages: tuple[str, ...] = tuple(PRICES)
    in_bytes: bool = False


def _asvd(units: Sequence[Unit], size_ratio: float, menu: Menu, given: Given) -> Allocation:
    if given["scores"] == "stable_rank":
        return sensitivity(units, size_ratio, stable_rank_scores(units, RATIOS), menu)
    scores = {name: {float(ratio): s for ratio, s in row.items()} for name, row in (given["measured"] or {}).items()}
    return sensitivity(units, size_ratio, scores, menu)


def _lems(units: Sequence[Unit], size_ratio: float, menu: Menu, given: Given) -> Allocation:
    measured = {name: {float(ratio): nats for ratio, nats in row.items()} for name, row in given["divergence"].items()}
    return lems(units, size_ratio, measured, given["depth_slope"], given.get("depth_exponent", 0.0), menu)


MENU = ("floor", "cap", "dense_option", "multiple_of")
RULES: dict[str, Rule] = {
    "dense": Rule(lambda units, size_ratio, menu, given: dense(units)),
    "uniform": Rule(lambda units, size_ratio, menu, given: uniform(units, size_ratio, menu), MENU),
    "effective_rank": Rule(
        lambda units, size_ratio, menu, given: effective_rank(units, size_ratio, given["beta"] or 0.0, menu),
        ("beta", *MENU),
    ),
    "released": Rule(
        lambda units, size_ratio, menu, given: released(units, size_ratio, given["beta"] or 0.0, menu),
        ("beta",),
        storages=("factors",),
    ),
    "sensitivity": Rule(_asvd, ("scores", "floor", "cap", "multiple_of"), needs=("scores",)),
    "least_loss": Rule(
        lambda units, size_ratio, menu, given: least_loss(units, size_ratio, menu), MENU, blocks=True, in_bytes=True
    ),
    "lems": Rule(_lems, ("depth_slope", "depth_exponent", "multiple_of"), needs=("depth_slope",)),
}


def allocate(units: Sequence[Unit | Block], size_ratio: float, menu: Menu, rule: str, given: Given) -> Allocation:
    """Ranks by the rule of that name, which sees blocks only if it allows them.

    Ranks under a budget of parameters know nothing of bits: all choices are then given the menu's.

    Args:
        size_ratio: share of the parameters, or bytes with a menu in bytes, that may be kept.

    Raises:
        InfeasibleBudgetError: the budget does not pay for the least that the rule may choose.
    """
    row = RULES[rule]
    shown = units if row.blocks else [unit for unit in units if isinstance(unit, Unit)]
    if menu.in_bytes:
        return row.allocate(shown, size_ratio, menu, given)
    (bits,) = menu.bits
    found = row.allocate(shown, size_ratio, replace(menu, bits=(FULL,), group=GROUP), given)
    return replace(found, choices={name: replace(choice, bits=bits) for name, choice in found.choices.items()})
