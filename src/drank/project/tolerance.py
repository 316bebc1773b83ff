"""How far results of different floating-point types may lie apart. Takes documents, knows no files."""

from collections.abc import Iterable, Mapping
from typing import Any

# Relative, of token perplexity: the same folders of the default model evaluated in bfloat16 and in float32 differ by
# .0004 to .0018 (dense and kfac-80, 6 windows each of two texts; docs/determinism.md).
DTYPE_TOLERANCE = 0.005


def other_dtypes(protocols: Iterable[Any]) -> str | None:
    """A sentence if results, given by ``protocol`` of each, were computed in several types; else None."""
    found = sorted({str(p["dtype"]) for p in protocols if isinstance(p, Mapping) and "dtype" in p})
    if len(found) < 2:
        return None
    told = f"a difference of less than {DTYPE_TOLERANCE:.1%} in token perplexity may come from the type alone"
    return f"Measured in different types, {' and '.join(found)}: {told}."
