"""Which stages ``dvc repro`` is about to run, about how long each takes here, and where in the whole it is.

A stage runs at most if DVC finds it changed, or if a stage before it runs. A stage may still be skipped: DVC may have
what it made from the same inputs in its cache, or the output before it may come out as it was.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from drank.planning.estimate import seconds
from drank.planning.facts import Facts
from drank.planning.machine import Speed
from drank.project.params import Params, ParamsError, read_params

TIMELESS = "time is told when the model is there"
STAGE = re.compile(r"^(?P<running>Running )?[Ss]tage '(?P<name>[^']+)'(:| is cached|(?P<same> didn't change))", re.M)


class Plan:
    """The stages that are left, by about how many seconds each takes; None where that is not known yet.

    Args:
        say: takes what a person is told, a line or more.
    """

    def __init__(self, root: Path, targets: Iterable[str], say: Callable[[str], None]) -> None:
        self.root, self.say = root, say
        self.speeds: dict[tuple[int, str], Speed] = {}
        names = planned(root, targets)
        self.left: dict[str, float | None] = dict.fromkeys(names or ())
        self.n_stages = len(self.left)
        with suppress(ParamsError):  # a stage will say what is wrong
            if self.left:
                self.params = read_params(root / "params.yaml")  # kept: somebody may edit the file meanwhile
                self.speeds = speeds(self.params)  # now: beside a stage half of it is measured
                self._estimate()
        if names is not None:
            self.say(self.table())

    def table(self) -> str:
        """Stages that will run."""
        if not self.left:
            return "nothing to run: every stage is up to date"
        counted = "1 stage" if len(self.left) == 1 else f"up to {len(self.left)} stages"
        if None in self.left.values():
            return f"{counted} to run ({TIMELESS}): {', '.join(self.left)}"
        width = max(map(len, self.left))
        rows = [f"  {name:{width}}  {duration(seconds or 0.0)}" for name, seconds in self.left.items()]
        return "\n".join([f"{counted} to run, about {duration(self._sum())} here:", *rows])

    def follow(self, line: str) -> None:
        """Take in a line of what ``dvc repro`` says; where a stage begins, say which it is of how many."""
        found = STAGE.match(line)
        if not found or found["name"] not in self.left:
            return
        name = found["name"]
        if found["running"] and None in self.left.values() and "raw" not in self.left and self._estimate():
            self.say(self.table())
        position = f"[{self.n_stages - len(self.left) + 1} of {self.n_stages}] {name}"
        left, taken = self._sum(), self.left.pop(name)
        if found["running"]:
            timed = "" if taken is None else f", about {duration(taken)}; about {duration(left)} left"
            self.say(position + timed)

    def _sum(self) -> float:
        return sum(seconds or 0.0 for seconds in self.left.values())

    def _estimate(self) -> bool:
        """Give every stage its time, if the model is at hand: fetched, or where it will come from."""
        taken = Facts(self.root, self.params).costs if self.speeds else {}
        if taken:
            times = seconds(taken, lambda *place: self.speeds[place])
            self.left = {name: times.get(name, 0.0) for name in self.left}
        return bool(taken)


def duration(seconds: float) -> str:
    """As exactly as an estimate deserves: ``5 s``, ``40 s``, ``3 min``, ``1.5 h``."""
    if seconds < 95:
        return f"{max(1, round(seconds, 0 if seconds < 10 else -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def speeds(params: Params) -> dict[tuple[int, str], Speed]:
    """How fast this machine is with the threads and devices that stages will have; empty if it cannot be measured."""
    places = {(section.threads, section.device) for section in (params.covariance, params.evaluation)}
    places |= {(v.healing.threads, v.healing.device) for v in params.variants.values() if v.healing}
    asked = [f"{threads}:{device}" for threads, device in sorted(places)]
    command = [sys.executable, "-m", "drank.planning.machine", params.compute.dtype, *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = json.loads(done.stdout) if done.returncode == 0 else []
    return dict(zip(sorted(places), (Speed(**row) for row in rows), strict=False))


def planned(root: Path, targets: Iterable[str]) -> list[str] | None:
    """Names of the stages that ``dvc repro TARGET...`` will run at most, in its order; None if that cannot be told.

    Mistakes in a project are left for ``dvc repro`` to tell.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--dry", "--force-downstream", *targets]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    names = [stage["name"] for stage in STAGE.finditer(done.stdout) if not stage["same"]]
    return list(dict.fromkeys(names)) if done.returncode == 0 else None
