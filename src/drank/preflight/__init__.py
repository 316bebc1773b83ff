"""Mistakes that can be known before anything computes, and would otherwise be found out after hours.

A check is a function from the facts to findings, and ``CHECKS`` the table of all; ``git`` needs no params.yaml. All
findings are said at once. No check imports torch, transformers, mlflow or lm-eval, so that all of them together take
about a second. MLflow's store is opened when the stages begin, which tells of one that cannot be used.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from drank.preflight.around import git, sources
from drank.preflight.facts import Facts, Finding, Findings, Level
from drank.preflight.machine import disk, memory
from drank.preflight.model import packages, positions, sizes, tokens
from drank.preflight.tasks import tasks
from drank.project.params import ParamsError, read_params
from drank.project.redaction import redact

CHECKS: tuple[Callable[[Facts], Findings], ...] = (
    sources, tasks, tokens, positions, packages, sizes, disk, memory,
)  # fmt: skip
LEVELS = ("error", "warning", "cannot say", "remark")


def preflight(root: Path) -> list[Finding]:
    """All findings, errors first."""
    found: list[tuple[Level, str]] = []
    checks: dict[str, Callable[[], Findings]] = {"git": partial(git, root)}
    try:
        facts = Facts(root, read_params(root / "params.yaml"))
        checks |= {check.__name__: partial(check, facts) for check in CHECKS}
    except ParamsError as error:
        found.append(("error", str(error)))
    for name, check in checks.items():
        try:
            found += check()
        except Exception as error:  # a file is not what it should be: whatever reads it next says more
            found.append(("cannot say", f"{name}: not checked: {type(error).__name__}: {error}"))
    said = (Finding(level, redact(text)) for level, text in found)
    return sorted(said, key=lambda finding: LEVELS.index(finding.level))
