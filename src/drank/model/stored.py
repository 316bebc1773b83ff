"""A module of the compressed model before it is put there."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """A module as config.json tells it, and its tensors by name; weights are (out, in), Conv1D's too."""

    name: str
    spec: dict[str, Any]
    tensors: Tensors
