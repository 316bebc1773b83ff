"""Links of a chain of evidence, and what was found of each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

Finding = Literal["holds", "does not hold", "cannot be checked here"]


class BrokenLinkError(ValueError):
    """Something is not as it should be; the message has both values."""


class UncheckableError(ValueError):
    """A check lacks something; the message says what, and what would bring it."""


@dataclass(frozen=True)
class Link:
    """One claim about a model folder, whether it holds, and why."""

    name: str
    finding: Finding
    detail: str


@dataclass
class Ledger:
    """Links in the order of their checks. A link whose needs do not hold is not looked at."""

    links: dict[str, Link] = field(default_factory=dict)

    def check(self, name: str, check: Callable[[], str], needs: tuple[str, ...] = ()) -> None:
        """Record what ``check`` finds: its answer where the link holds, or one of the two errors above.

        A user error of drank's (a damaged file, a lock that is none) breaks the link too; any other exception is a bug.
        """
        for need in needs:
            if not self.holds(need):
                self.links[name] = Link(name, "cannot be checked here", f"needs '{need}', which was not found to hold")
                return
        try:
            self.links[name] = Link(name, "holds", check())
        except UncheckableError as error:
            self.links[name] = Link(name, "cannot be checked here", str(error))
        except ValueError as error:
            if not type(error).__module__.startswith("drank."):
                raise
            self.links[name] = Link(name, "does not hold", str(error))

    def holds(self, name: str) -> bool:
        return name in self.links and self.links[name].finding == "holds"

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links.values())
