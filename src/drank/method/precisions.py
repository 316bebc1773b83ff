"""The table of precisions, whose rows params.yaml may name, and the bytes that a matrix takes in each.

``accepts`` names the parameters that a row reads. params.yaml is checked against it, so that no parameter is ignored.
Importing this module needs no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integer = int | NDArray[np.int64]
FULL = 16  # bits of bfloat16: nothing is rounded to a grid
GROUP = 64  # inputs per group where params.yaml does not say
EMBEDDING_BITS = (8, FULL)  # on offer for embeddings


@dataclass(frozen=True)
class Precision:
    """How the numbers of a model's linears are stored.

    Attributes:
        bits: per number; :data:`FULL` is bfloat16, None what the allocation gives each matrix.
        accepts: parameters of section ``presets`` that go with it.
        needs: accepted parameters that params.yaml must give.
    """

    bits: int | None
    accepts: tuple[str, ...] = ("rounding", "group_size")
    needs: tuple[str, ...] = ()


PRECISIONS: dict[int | str, Precision] = {
    16: Precision(FULL, accepts=()),
    8: Precision(8),
    4: Precision(4),
    3: Precision(3),
    2: Precision(2),
    "mixed": Precision(None),
}


@dataclass(frozen=True)
class Grid:
    """A family of grids.

    Attributes:
        bits: 2 to 8.
        group: inputs that share a scale and a zero point; the last group of a row may be shorter.
        symmetric: the zero point is the middle, 2^(bits - 1), and nobody stores it.
    """

    bits: int
    group: int = GROUP
    symmetric: bool = False

    @property
    def levels(self) -> int:
        return 2**self.bits

    def bits_of(self, out_features: Integer, in_features: Integer) -> Integer:
        """Bits that a matrix takes: its integers, a 16-bit scale per group, and a zero point of ``bits`` per group.

        Integers and zero points of a row end with a whole byte.
        """
        n_groups = -(-in_features // self.group)
        zeros = 0 if self.symmetric else packed_bytes(n_groups, self.bits)
        return 8 * out_features * (packed_bytes(in_features, self.bits) + 2 * n_groups + zeros)


def planes(bits: int) -> list[int]:
    """Widths, from the lowest bit of a number on, of the parts that share bytes with their like: 3 is 2 + 1."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def packed_bytes(n: Integer, bits: int) -> Integer:
    """Bytes of a row of ``n`` integers: each plane ends with a whole byte."""
    return sum(-(-n * width // 8) for width in planes(bits))


# Stored matrices of a form, (rows, columns) each, and how many places (int32) it has. A storage that has a row here may
# be rounded.
STORED: dict[str, Callable[[int, int, Integer], tuple[list[tuple[Integer, Integer]], int]]] = {
    "dense": lambda n_out, n_in, k: ([(n_out, n_in)], 0),
    "factors": lambda n_out, n_in, k: ([(n_out, k), (k, n_in)], 0),
    "pivot": lambda n_out, n_in, k: ([(k, n_in), (n_out - k, k)], n_out),
}


def bytes_of(form: str, n_out: int, n_in: int, rank: Integer, bits: int, group: int) -> Integer:
    """Bytes of an (out, in) matrix in this form: integers, scales and zero points or bfloat16, and places."""
    matrices, places = STORED[form](n_out, n_in, rank)
    if bits == FULL:
        return sum(2 * rows * columns for rows, columns in matrices) + 4 * places
    return sum(Grid(bits, group).bits_of(rows, columns) // 8 for rows, columns in matrices) + 4 * places


def embedding_bytes(n_tokens: int, width: int, bits: int) -> int:
    """Bytes of an embedding matrix: bfloat16, or integers of 8 bits and a scale per token."""
    return n_tokens * (2 * width if bits == FULL else width + 2)
