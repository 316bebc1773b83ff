"""Progress of a long step: a bar on a terminal, and a line every half minute where standard error is none."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines of a log; a step that is done sooner leaves none
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}{postfix}, {remaining} left"


def progress(
    items: Iterable[Any] | None = None, *, desc: str, unit: str, quiet: bool = False, **more: Any
) -> "tqdm[Any]":
    """Items that say how many of them are done; without items a counter with ``update``, to be closed.

    Args:
        desc: name of the step.
        unit: name of the items, in the plural.
        quiet: say nothing, as all processes of a group but the first do.
        more: tqdm's own, such as ``total``, ``initial`` and ``leave``.
    """
    if quiet or sys.stderr.isatty():
        return tqdm(items, desc=desc, unit=unit, disable=quiet, **more)
    # TQDM_DISABLE, which keeps the bars of libraries out of a log, does not silence these lines.
    lines = {"file": _Lines(), "bar_format": LINE, "mininterval": INTERVAL, "maxinterval": INTERVAL, "delay": INTERVAL}
    return tqdm(items, desc=desc, unit=unit, disable=False, miniters=1, **more | lines | {"leave": False})


class _Lines:
    """Standard error, where tqdm's returns of the carriage become ends of lines."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        if line := text.strip():
            with suppress(OSError, ValueError):  # a stage does not end because nobody listens any more
                sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
