"""Links of a chain of evidence, and what was found of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from drank.project.documents import VersionError
from drank.project.dvc import ConfigurationError
from drank.project.git import GitError
from drank.project.refusals import refusal

Finding = Literal["holds", "does not hold", "cannot be checked here"]
Source = Literal["folder", "card", "git", "artefacts", "mlflow", "rebuilt"]


class BrokenLinkError(ValueError):
    """Something is not as it should be; the message has both values."""


class UncheckableError(ValueError):
    """A check lacks something; the message says what, and what would bring it."""


@dataclass(frozen=True)
class Link:
    """One claim about a model folder, whether it holds, and why; ``source`` is what can tell."""

    name: str
    finding: Finding
    detail: str
    source: Source = "folder"


@dataclass
class Ledger:
    """Links in the order of their checks. A link whose needs do not hold is not looked at."""

    links: dict[str, Link] = field(default_factory=dict)

    def check(
        self, name: str, check: Callable[[], str], needs: tuple[str, ...] = (), source: Source = "folder"
    ) -> None:
        """Record what ``check`` finds: its answer where the link holds, or one of the two errors above.

        A user error of drank's (a damaged file, a lock that is none) breaks the link too. That git or the system
        refuses to look says nothing of the link. Any other exception is a bug.
        """
        self.links[name] = Link(name, *self._found(check, needs), source)

    def _found(self, check: Callable[[], str], needs: tuple[str, ...]) -> tuple[Finding, str]:
        if lacking := [need for need in needs if not self.holds(need)]:
            return "cannot be checked here", f"needs '{lacking[0]}', which was not found to hold"
        try:
            return "holds", check()
        except (UncheckableError, ConfigurationError, GitError, VersionError) as error:
            return "cannot be checked here", str(error)
        except (ValueError, OSError) as error:
            if refused := refusal(error):
                return "cannot be checked here", str(refused)
            if not type(error).__module__.startswith("drank."):
                raise
            return "does not hold", str(error)

    def holds(self, name: str) -> bool:
        return name in self.links and self.links[name].finding == "holds"

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links.values())
