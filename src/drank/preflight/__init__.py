"""Mistakes that can be known before anything computes, and would otherwise be found out after hours.

A check is a function from the facts, or from the project's folder, to findings; ``CHECKS`` and ``AROUND`` are the
tables of all. All findings are said at once. No check imports torch, transformers, mlflow or lm-eval, so that all of
them together take about a second.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from drank.preflight.around import git, places, sources, store
from drank.preflight.facts import Facts, Finding
from drank.preflight.machine import disk, memory
from drank.preflight.model import lengths, packages, positions, sizes, tokens
from drank.preflight.tasks import tasks
from drank.project.params import ParamsError, read_params
from drank.project.redaction import redact

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    sources, tasks, tokens, positions, lengths, packages, sizes, disk, memory,
)  # fmt: skip
AROUND: tuple[Callable[[Path], Iterator[Finding]], ...] = (git, places, store)
LEVELS = ("error", "warning", "cannot say", "remark")


def preflight(root: Path) -> list[Finding]:
    """All findings, errors first."""
    found: list[Finding] = []
    checks = {check.__name__: partial(check, root) for check in AROUND}
    try:
        facts = Facts(root, read_params(root / "params.yaml"))
        checks |= {check.__name__: partial(check, facts) for check in CHECKS}
    except ParamsError as error:
        found.append(Finding("error", str(error)))
    for name, check in checks.items():
        try:
            found += check()
        except Exception as error:  # of files that are not what they should be: whatever reads them next says more
            found.append(Finding("cannot say", f"{name}: not checked: {type(error).__name__}: {error}"))
    said = (Finding(finding.level, redact(finding.text)) for finding in found)
    return sorted(said, key=lambda finding: LEVELS.index(finding.level))
