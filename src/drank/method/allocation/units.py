"""Units with the ranks on offer and their prices, from which a rule chooses, and the choices with their totals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from drank.method.precisions import FULL, GROUP, bytes_of

Integer = int | NDArray[np.int64]

# Storages: parameters of rank k of an (out, in) matrix. A new form of storage is a row here, one of FORMS in
# model/layers.py and one of LAYOUTS in steps/compression.py.
PRICES: dict[str, Callable[[int, int, Integer], Integer]] = {
    "factors": lambda n_out, n_in, k: k * (n_out + n_in),
    "pivot": lambda n_out, n_in, k: k * (n_out + n_in - k),  # k rows kept, the rest as combinations of them
}


# Loss of rounding a pivot form, over that of rounding the whole matrix to the same bits: 1.7 to 6.4 in 44 of 48 cases
# on the default model, 2.9 on average at 3 bits and 3.5 at 4, and less in the others (docs/log.md). Rows that are
# rounded bring their errors into the others; refitting the coefficients takes off most of that.
PIVOT_ROUNDING = 3.5


@dataclass(frozen=True)
class Menu:
    """Ranks on offer, and their prices in parameters or bytes.

    Attributes:
        storage: a row of :data:`PRICES`.
        floor: smallest rank offered, as a share of the full rank (at least 1).
        cap: largest rank offered, as a share of the full rank.
        dense: whether the matrix may also stay as it is; a matrix that no rank offered makes smaller always may.
        multiple_of: ranks offered are multiples of it (8, 16 or 32 for fast kernels); the dense matrix always is.
        bits: bits per number that ranks and the dense matrix are offered in; several are for budgets in bytes.
        group: inputs that share a scale below 16 bits.
        in_bytes: the budget is one of bytes, not of parameters.
    """

    storage: str = "factors"
    floor: float = 0.0
    cap: float = 1.0
    dense: bool = True
    multiple_of: int = 1
    bits: tuple[int, ...] = (FULL,)
    group: int = GROUP
    in_bytes: bool = False

    def price(self, unit: "Unit", rank: Integer) -> Integer:
        """Parameters of this rank."""
        return PRICES[self.storage](unit.out_features, unit.in_features, rank)

    def weight(self, unit: "Unit", rank: Integer | None, bits: int) -> Integer:
        """Price of this rank, or of the dense matrix for None, in the budget's unit; a bias costs nothing."""
        if not self.in_bytes:
            return unit.dense_price if rank is None else self.price(unit, rank)
        form, k = ("dense", 0) if rank is None else (self.storage, rank)
        return bytes_of(form, unit.out_features, unit.in_features, k, bits, self.group)

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

    def choice(self, unit: "Unit", rank: int, objective_share: float, bits: int = FULL) -> "Choice":
        """This rank, as the rule values it."""
        return Choice(rank, self.storage, int(self.price(unit, rank)), objective_share, bits)


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
        rounding: loss of rounding the whole matrix to each number of bits, in the unit of the energies.
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
    rounding: Mapping[int, float] = field(default_factory=dict)

    @property
    def cuts(self) -> "tuple[tuple[Unit, ...], ...]":
        """As those of a block: the one thing that a matrix is offered as is itself."""
        return ((self,),)

    @property
    def dense_price(self) -> int:
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    def rounded(self, rank: Integer | None, bits: int) -> float:
        """Loss of rounding this rank, or the dense matrix for None, to these bits; 0 where it is not known."""
        whole = 0.0 if bits == FULL else self.rounding.get(bits, 0.0)
        return whole if rank is None else whole * PIVOT_ROUNDING


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
    """A unit's share. form "dense" keeps the matrix as it is: rank = full rank, price = out * in, loss 0.

    Attributes:
        price: in parameters, whatever the budget is in.
        bits: per number; below 16 the numbers are rounded, a dense matrix's too.
    """

    rank: int
    form: str
    price: int
    objective_share: float
    bits: int = FULL


@dataclass(frozen=True)
class Allocation:
    """Choices by unit name, with objective, certified bound, budget and the price of all choices.

    cuts[name] is the index of the cut that a block was given; choices then has that cut's matrices. Budget and price
    are in parameters; bytes_budget is there where the budget was one of bytes, and the other then excludes nothing.
    """

    choices: dict[str, Choice]
    objective: float
    bound: float
    budget: int
    price: int
    targeted_parameters: int
    cuts: dict[str, int] = field(default_factory=dict)
    bytes_budget: int | None = None

    def matrices(self, units: "Sequence[Unit | Block]") -> list[Unit]:
        """The matrices that have choices: units themselves, and those of a block's cut."""
        return [matrix for unit in units for matrix in unit.cuts[self.cuts.get(unit.name, 0)]]

    @property
    def gap(self) -> float:
        """(objective - bound) / |objective|; 0 where the ranks are optimal for the rule."""
        return max(0.0, self.objective - self.bound) / abs(self.objective) if self.objective else 0.0

    @property
    def kept_ratio(self) -> float:
        return self.price / self.targeted_parameters


def loss(unit: Unit, choice: Choice) -> float:
    """Energy dropped, Σ_{i>k} s_i², loss of rounding and the unit's base loss, in the unit of the metric."""
    dense = choice.form == "dense"
    dropped = 0.0 if dense else float(unit.energies[choice.rank :].sum())
    return unit.base_loss + dropped + float(unit.rounded(None if dense else choice.rank, choice.bits))


def dense_choice(unit: Unit, objective_share: float, bits: int = FULL) -> Choice:
    """The whole matrix, at these bits per number."""
    return Choice(unit.full_rank, "dense", unit.dense_price, objective_share, bits)


def by_kind(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units of each kind, in the order in which the kinds first appear."""
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    return list(kinds.values())


def budget_of(units: Sequence[Unit | Block], size_ratio: float, *, in_bytes: bool = False) -> int:
    """Parameters, or bytes, that may be kept of all units at full size and 16 bits, rounded down."""
    return int(size_ratio * (sum(u.dense_price for u in units) * (FULL // 8 if in_bytes else 1)) + 1e-6)


def summed(units: Sequence[Unit | Block], choices: dict[str, Choice], budget: int, bound: float) -> Allocation:
    """The allocation that these choices make, with its totals; a bound above the objective is rounding."""
    objective = float(sum(choice.objective_share for choice in choices.values()))
    price, targeted = sum(c.price for c in choices.values()), sum(u.dense_price for u in units)
    return Allocation(choices, objective, min(bound, objective), budget, price, targeted)
