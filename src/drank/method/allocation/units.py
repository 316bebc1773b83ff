"""Units with the ranks on offer and their prices, from which a rule chooses, and the choices with their totals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Integer = int | NDArray[np.int64]

# Storages: parameters of rank k of an (out, in) matrix. A new form of storage is a row here, one of FORMS in
# model/layers.py and one of LAYOUTS in steps/compression.py.
PRICES: dict[str, Callable[[int, int, Integer], Integer]] = {
    "factors": lambda n_out, n_in, k: k * (n_out + n_in),
    "pivot": lambda n_out, n_in, k: k * (n_out + n_in - k),  # k rows kept, the rest as combinations of them
}


@dataclass(frozen=True)
class Menu:
    """Ranks on offer, and their prices in parameters.

    Attributes:
        storage: a row of :data:`PRICES`.
        floor: smallest rank offered, as a share of the full rank (at least 1).
        cap: largest rank offered, as a share of the full rank.
        dense: whether the matrix may also stay as it is; a matrix that no rank offered makes smaller always may.
        multiple_of: ranks offered are multiples of it (8, 16 or 32 for fast kernels); the dense matrix always is.
    """

    storage: str = "factors"
    floor: float = 0.0
    cap: float = 1.0
    dense: bool = True
    multiple_of: int = 1

    def price(self, unit: "Unit", rank: Integer) -> Integer:
        """Parameters of this rank."""
        return PRICES[self.storage](unit.out_features, unit.in_features, rank)

    def ranks(self, unit: "Unit") -> NDArray[np.int64]:
        """Ranks that cost less than the dense matrix, ascending; none for a matrix too thin to factor."""
        lowest = max(1, int(np.ceil(self.floor * unit.full_rank)))
        highest = int(np.floor(self.cap * unit.full_rank + 1e-9))
        ranks = np.arange(1, min(len(unit.energies), highest) + 1)
        return ranks[(ranks >= lowest) & (ranks % self.multiple_of == 0) & (self.price(unit, ranks) < unit.dense_price)]

    def rank_at(self, unit: "Unit", ratio: float) -> int | None:
        """The largest rank offered whose price is at most ratio * out * in; None where there is none."""
        ranks = self.ranks(unit)
        affordable = ranks[self.price(unit, ranks) <= ratio * unit.dense_price + 1e-6]
        return int(affordable[-1]) if len(affordable) else None

    def choice(self, unit: "Unit", rank: int, objective_share: float) -> "Choice":
        """This rank, as the rule values it."""
        return Choice(rank, self.storage, int(self.price(unit, rank)), objective_share)


DEFAULT = Menu()


@dataclass(frozen=True)
class Unit:
    """One matrix to be given a rank: a layer's, the rest of it after a removal of channels, or a stack of layers'.

    Attributes:
        kind: matrices of one kind share a budget under the rules that allocate by type (``q_proj``, ...).
        role: "query", "key", "value" where the model knows it; rebalancing moves parameters between those.
        energies: squared singular values in the metric, descending; Σ_{i>k} is the loss of keeping k.
        effective_rank: R of the spectrum, 1 <= R <= len(energies).
        base_loss: loss at any rank, in the unit of the energies: the cost of the channels that an MLP has lost.
    """

    name: str
    kind: str
    role: str | None
    layer: int
    out_features: int
    in_features: int
    energies: NDArray[np.float64]
    effective_rank: float
    base_loss: float = 0.0

    @property
    def dense_price(self) -> int:
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class Block:
    """Matrices that lose channels together: an MLP.

    Attributes:
        cuts: the matrices at each number of channels on offer, all of them first.
    """

    name: str
    cuts: tuple[tuple[Unit, ...], ...]

    @property
    def dense_price(self) -> int:
        return sum(u.dense_price for u in self.cuts[0])


@dataclass(frozen=True)
class Choice:
    """A unit's share. form "dense" keeps the matrix as it is: rank = full rank, price = out * in, loss 0."""

    rank: int
    form: str
    price: int
    objective_share: float


@dataclass(frozen=True)
class Allocation:
    """Choices by unit name, with objective, certified bound, budget and the price of all choices.

    cuts[name] is the index of the cut that a block was given; choices then has that cut's matrices.
    """

    choices: dict[str, Choice]
    objective: float
    bound: float
    budget: int
    price: int
    targeted_parameters: int
    cuts: dict[str, int] = field(default_factory=dict)

    def matrices(self, units: "Sequence[Unit | Block]") -> list[Unit]:
        """The matrices that have choices: units themselves, and those of a block's cut."""
        return [m for u in units for m in (u.cuts[self.cuts[u.name]] if isinstance(u, Block) else (u,))]

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|; 0 where the ranks are optimal for the rule."""
        return max(0.0, self.objective - self.bound) / abs(self.objective) if self.objective else 0.0

    @property
    def kept_ratio(self) -> float:
        return self.price / self.targeted_parameters


def loss(unit: Unit, choice: Choice) -> float:
    """Energy dropped, Σ_{i>k} s_i² and the unit's base loss, in the unit of the metric."""
    return unit.base_loss + (0.0 if choice.form == "dense" else float(unit.energies[choice.rank :].sum()))


def dense_choice(unit: Unit, objective_share: float) -> Choice:
    """The matrix as it is."""
    return Choice(unit.full_rank, "dense", unit.dense_price, objective_share)


def by_kind(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units of each kind, in the order in which the kinds first appear."""
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return list(kinds.values())


def budget_of(units: Sequence[Unit | Block], size_ratio: float) -> int:
    """Parameters that may be kept, rounded down."""
    return int(size_ratio * sum(u.dense_price for u in units) + 1e-6)


def summed(units: Sequence[Unit | Block], choices: dict[str, Choice], budget: int, bound: float) -> Allocation:
    """The allocation that these choices make, with its totals; a bound above the objective is rounding."""
    objective = float(sum(choice.objective_share for choice in choices.values()))
    price, targeted = sum(c.price for c in choices.values()), sum(u.dense_price for u in units)
    return Allocation(choices, objective, min(bound, objective), budget, price, targeted)
