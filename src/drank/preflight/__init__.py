"""What can be known before anything computes, and would otherwise be found out after hours.

A check is a function from the facts to findings, and ``CHECKS`` is the table of all. All findings are said at once. No
check imports torch, transformers, mlflow or lm-eval, so that all of them together take about a second.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from drank.preflight.around import git, sources, store
from drank.preflight.facts import Facts, Finding
from drank.preflight.machine import disk, memory
from drank.preflight.model import packages, positions, sizes, tokens
from drank.preflight.tasks import tasks
from drank.project.params import Params

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    sources, tasks, tokens, positions, packages, sizes, disk, memory, git, store,
)  # fmt: skip
LEVELS = ("error", "warning", "cannot say", "remark")


def preflight(root: Path, params: Params) -> list[Finding]:
    """All findings, errors first."""
    facts, found = Facts(root, params), list[Finding]()
    for check in CHECKS:
        try:
            found += check(facts)
        except Exception as error:  # of files that are not what they should be: whatever reads them next says more
            found.append(Finding("cannot say", f"{check.__name__}: not checked: {type(error).__name__}: {error}"))
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))
