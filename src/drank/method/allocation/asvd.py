r"""ASVD's allocation (arXiv:2312.05821): a score for every unit and size, and one threshold for all. Numbers only.

A score says how bad it is to keep a unit at a ratio of its parameters; higher is worse. ASVD has two: the perplexity of
the model with that one unit truncated (``model.substitution`` measures it), and a guess from its stable rank.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from drank.method.allocation.knapsack import InfeasibleBudgetError
from drank.method.allocation.rules import dense
from drank.method.allocation.units import DEFAULT, Allocation, Choice, Menu, Unit, budget_of, dense_choice, summed

Scores = Mapping[str, Mapping[float, float]]


def sensitivity(units: Sequence[Unit], size_ratio: float, scores: Scores, menu: Menu = DEFAULT) -> Allocation:
    r"""Every unit at the smallest ratio that it bears, under the least threshold that meets the budget.

    .. math:: \rho_u(t) = \min \{ \rho : \mathrm{score}_u(\rho) \le t \} \cup \{1\}, \qquad
        t^* = \min \{ t : \sum_u \mathrm{price}_u(\rho_u(t)) \le B \}

    Prices fall as t grows, so t* is found by bisection among the scores. The rank of a ratio is ``Menu.rank_at``, and 1
    is the dense matrix. ASVD's own search sorts single (unit, ratio) pairs; here equal scores pass the threshold
    together, so that the order of units does not matter. Prices are those of the ranks, not ratios, so the result is
    never above the budget. It may be well below: a grid of ratios is coarse.

    The objective is t*, the worst score accepted, and the bound is t* too: no choice of scored ratios within the budget
    has a better worst one (0 where all stay dense). A unit's share of the objective is its own score, 0 if dense.

    Args:
        scores: by unit name and ratio kept; at least the units' names, with ratios in (0, 1). Ratios of 1 and above, or
            without a rank in the menu, are ignored.

    Raises:
        ValueError: a unit has no scores, a score is NaN, or the menu has no dense matrix to start from.
        InfeasibleBudgetError: even the smallest ratios exceed the budget.
    """
    if not menu.dense:
        raise ValueError(
            "menu.dense is False, but ASVD's search starts from dense matrices and keeps those most sensitive; "
            "allow dense, or choose another allocation"
        )
    if size_ratio >= 1:
        return dense(units)
    options = {u.name: _options(u, scores, menu) for u in units}
    budget = budget_of(units, size_ratio)
    thresholds = sorted({option.objective_share for row in options.values() for option in row})

    def chosen(threshold: float) -> dict[str, Choice]:
        return {u.name: _smallest(u, options[u.name], threshold) for u in units}

    def price(threshold: float) -> int:
        return sum(choice.price for choice in chosen(threshold).values())

    index = bisect_left(thresholds, True, key=lambda threshold: price(threshold) <= budget)
    if index == len(thresholds):
        least, whole = price(math.inf), budget_of(units, 1.0)
        raise InfeasibleBudgetError(
            f"size_ratio {size_ratio}: the smallest ratios that have scores keep {least} of {whole} parameters, above "
            f"the budget of {budget}; raise size_ratio to {least / whole:.4f} or more, or score smaller ratios"
        )
    found = summed(units, chosen(thresholds[index]), budget, thresholds[index])
    return replace(found, objective=thresholds[index], bound=thresholds[index])


def stable_rank_scores(units: Iterable[Unit], ratios: Sequence[float]) -> dict[str, dict[float, float]]:
    r"""ASVD's scores that need no forward pass, from the stable rank of the unit in its metric.

    .. math:: \mathrm{score}_u(\rho) = -\rho^{0.1} \sqrt{\textstyle\sum_i s_i^2 / s_1^2}

    No unit: a flat spectrum of r components at ρ = 1 scores -√r, a single direction -1, and so does a zero matrix by
    convention. The square root of the stable rank ‖W‖_F² / ‖W‖₂² is that of ASVD's code
    (github.com/hahnyuan/ASVD4LLM, sensitivity.py), which takes the unscaled W (metric ``none``); in the metric
    ``diagonal`` it is the scaled W of ASVD's paper.

    Raises:
        ValueError: a ratio is not in (0, 1).
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio {ratio}: a share of a unit's parameters, in (0, 1); at 1 it stays dense anyway")
    return {u.name: {ratio: -_root_stable_rank(u) * ratio**0.1 for ratio in ratios} for u in units}


def _options(unit: Unit, scores: Scores, menu: Menu) -> list[Choice]:
    """By ratio, ascending; a choice's share of the objective is its score."""
    if unit.name not in scores:
        raise ValueError(
            f"{unit.name}: has no scores ({len(scores)} units have); measure the same targets that are allocated"
        )
    options = []
    for ratio, score in sorted(scores[unit.name].items()):
        if math.isnan(score):
            raise ValueError(f"{unit.name}: the score at ratio {ratio} is NaN; measure it again, or leave it out")
        rank = menu.rank_at(unit, ratio)
        if ratio < 1 and rank is not None:
            options.append(menu.choice(unit, rank, float(score)))
    return options


def _smallest(unit: Unit, options: Sequence[Choice], threshold: float) -> Choice:
    return next((option for option in options if option.objective_share <= threshold), dense_choice(unit, 0.0))


def _root_stable_rank(unit: Unit) -> float:
    return math.sqrt(float(unit.energies.sum() / unit.energies[0])) if unit.energies[0] > 0 else 1.0
