"""A finding of a check, and how grave it is."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "cannot say", "remark"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found, in one sentence: the key of params.yaml or the place, its value, the rule, the fix.

    Attributes:
        level: an ``error`` ends `drank run` before it begins; what a check ``cannot say`` is counted beside the others.
    """

    level: Level
    text: str
