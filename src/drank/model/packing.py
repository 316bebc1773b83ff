"""Rounded matrices as a folder has them: integers of 2 to 8 bits in bytes, with scales and zero points beside them.

A matrix (rows, n) called ``weight``, rounded to s (q - z), is three tensors:

* ``weight`` (rows, bytes, 1) uint8, the q, packed;
* ``weight_scales`` (rows, groups) in the model's dtype, the s, which are bfloat16 numbers;
* ``weight_zeros`` (rows, bytes) uint8, the z, packed.

The third dimension is there so that ``weight`` never has the shape of a dense weight: a loader that does not know the
format stops at the mismatch. A number is cut into planes of 4, 2 and 1 bits (3 bits are 2 and 1); the planes of a row
follow each other, from the lowest bits on. With m bytes in a plane of width w, byte j has numbers j, m + j, 2 m + j and
so on, from its lowest bits on: unpacking then makes long runs.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from drank.method.precisions import Grid, packed_bytes, planes
from drank.model.format import SCALES, ZEROS

Shapes = dict[str, tuple[int, ...]]


def packed_shapes(name: str, shape: tuple[int, ...], grid: Grid) -> Shapes:
    """Name and shape of the tensors of a matrix."""
    rows, columns = shape
    n_groups = -(-columns // grid.group)
    return {
        name: (rows, int(packed_bytes(columns, grid.bits)), 1),
        f"{name}{SCALES}": (rows, n_groups),
        f"{name}{ZEROS}": (rows, int(packed_bytes(n_groups, grid.bits))),
    }


def pack(numbers: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Numbers below 2^bits, in bytes."""
    parts, below = [], 0
    for width in planes(bits):
        plane = (numbers >> below) & (2**width - 1)
        per_byte, below = 8 // width, below + width
        n_bytes = -(-numbers.shape[1] // per_byte)
        plane = torch.nn.functional.pad(plane, (0, n_bytes * per_byte - numbers.shape[1])).view(-1, per_byte, n_bytes)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=numbers.device)[:, None]
        parts.append((plane << shifts).sum(1, dtype=torch.uint8))
    return torch.cat(parts, -1)


def unpack(stored: UInt8[Tensor, "rows bytes"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """The first ``n`` numbers of each row."""
    if bits == 8:
        return stored
    found, below = None, 0
    for plane, width in zip(
        stored.split([packed_bytes(n, width) for width in planes(bits)], -1), planes(bits), strict=True
    ):
        mask = 2**width - 1
        part = torch.cat([(plane >> shift) & mask for shift in range(0, 8, width)], -1)[:, :n]
        found, below = part if found is None else found | (part << below), below + width
    assert found is not None
    return found


def unpacked(
    codes: UInt8[Tensor, "rows bytes 1"],
    scales: Float[Tensor, "rows groups"],
    zeros: UInt8[Tensor, "rows zero_bytes"],
    grid: Grid,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """s (q - z): the differences are exact, their product with s is rounded once to ``dtype``."""
    n_groups, spare = scales.shape[1], -columns % grid.group
    q, z = unpack(codes[..., 0], grid.bits, columns), unpack(zeros, grid.bits, n_groups)[..., None]
    q = torch.nn.functional.pad(q, (0, spare)) if spare else q
    q, s = q.view(-1, n_groups, grid.group), scales.to(dtype)[..., None]
    # Subtracted in bytes where differences fit into one: a fifth faster than in the dtype.
    differences = q.to(dtype).sub_(z) if grid.bits == 8 else (q.view(torch.int8) - z.view(torch.int8)).to(dtype)
    numbers = differences.mul_(s).view(-1, n_groups * grid.group)
    return numbers[:, :columns] if spare else numbers
