"""How far a long step is: a bar on a terminal, and a line every half minute where standard error is none."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0  # seconds between lines of a log; a step that is done sooner leaves none
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}{postfix}, {remaining} left"


def progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    quiet: bool = False,
) -> "tqdm[Any]":
    """Items that say how many of them are done; without items a counter with ``update``, to be closed.

    Args:
        desc: what is at work.
        unit: name of the items, in the plural.
        total: number of items, where ``items`` has no length.
        initial: number of items that were done before.
        leave: keep the bar on a terminal when it is full.
        quiet: say nothing, as all processes of a group but the first do.
    """
    shared: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial}
    if quiet:
        return tqdm(items, disable=True, **shared)
    if sys.stderr.isatty():
        return tqdm(items, leave=leave, **shared)
    # TQDM_DISABLE, which keeps the bars of libraries out of a log, does not silence these lines.
    return tqdm(
        items, disable=False, file=_Lines(), bar_format=LINE, leave=False,
        mininterval=INTERVAL, maxinterval=INTERVAL, delay=INTERVAL, miniters=1, **shared,
    )  # fmt: skip


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
