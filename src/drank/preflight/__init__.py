"""Mistakes that can be known before anything computes, and would otherwise be found out after hours.

A check is a function from the facts to findings, and ``CHECKS`` is the table of all. All findings are said at once. No
check imports torch, transformers, mlflow or lm-eval, so that all of them together take about a second.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from drank.planning.facts import Facts
from drank.preflight.finding import Finding, Level
from drank.preflight.machine import devices, disk, memory
from drank.preflight.model import experts, rolling, sizes, sources, windows
from drank.preflight.project import git, places, store
from drank.preflight.tasks import tasks
from drank.project.params import ParamsError
from drank.project.redaction import redact

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    sources, tasks, rolling, windows, experts, devices, sizes, disk, memory, git, store, places,
)  # fmt: skip


def preflight(root: Path) -> list[Finding]:
    """All findings, errors first."""
    facts = Facts(root)
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(facts)
        except ParamsError as error:  # the same for every check that asks for them
            found.append(Finding("error", str(error)))
        except Exception as error:  # of files that are not what they should be: whatever reads them next says more
            found.append(Finding("cannot say", f"{check.__name__}: not checked: {type(error).__name__}: {error}"))
    said = dict.fromkeys(Finding(finding.level, redact(finding.text)) for finding in found)
    return sorted(said, key=lambda finding: get_args(Level).index(finding.level))
