"""Two commands at once in one project, or on one store of MLflow, started at random distances; what is left of it.

``python -m tests.faults.two_at_once --n 120`` makes a small project, tries so often, each case in turn, and prints::

    tried      how often
    both       both did their work: one waited for the other, or they did not meet
    refused    one or both ended with a message and wrote nothing wrong; the command that is typed again succeeds
    lost       a traceback, a message that says nothing, other bytes than those of an undisturbed run, a damaged entry
               of the cache, a leftover, a run of MLflow that is missing, there twice, or a mixture of two states
"""

import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml
import zc.lockfile
from mlflow import MlflowClient

from tests.faults.campaign import (
    DRANK,
    DVC,
    Started,
    campaign,
    change,
    check,
    check_runs,
    contents,
    damaged_entries,
    differing,
    run,
)  # fmt: skip
from tests.toy import serving

VARIANT = "d-rank-80"
RATIO = 0.7  # which the project is not reproduced with
REPRO, RUN, TRACK = (*DVC, "repro"), (*DRANK, "run"), (*DRANK, "track")

# Said by DVC when two of it meet: both sentences name what is in the way and what to do.
MET = ("is busy, it is being blocked by", "Unable to acquire lock. Most likely another DVC process is running")


def set_ratio(root: Path, ratio: float) -> None:
    variants = yaml.safe_load((root / "params.yaml").read_text())["variants"]
    variants[VARIANT]["size_ratio"] = ratio
    change(root, variants=variants)


def store(root: Path) -> str:
    return f"sqlite:///{root}/mlflow.db"


class Projects:
    """Copies of one reproduced project, and what undisturbed runs make of it.

    Where commands are to be ``quick``, they are pytest's forks, begin at once, and are started a tenth as far apart.
    """

    def __init__(self, project: Path, scratch: Path, seed: int, quick: bool = False) -> None:
        self.project, self.scratch, self.quick = project, scratch, quick
        self.draw = random.Random(seed)
        self.expected: dict[float, dict[str, str]] = {}
        self.length, self.n_copies = 0.0, 0

    def start(self, root: Path, *command: str, **variables: str) -> Started:
        return Started(root, *command, quick=self.quick, **variables)

    def pause(self) -> None:
        """Up to a second."""
        time.sleep(self.draw.random() * (0.1 if self.quick else 1))

    def copy(self, ratio: float | None = None) -> Path:
        self.n_copies += 1
        root = self.scratch / str(self.n_copies) / "project"
        shutil.copytree(self.project, root, symlinks=True)
        if ratio is not None:
            set_ratio(root, ratio)
        return root

    def undisturbed(self, ratio: float) -> dict[str, str]:
        """Contents after one `dvc repro` with this ratio; how long it takes is remembered."""
        if ratio not in self.expected:
            root, before = self.copy(ratio), time.monotonic()
            run(root, *REPRO)
            self.length = time.monotonic() - before
            self.expected[ratio] = contents(root)
            shutil.rmtree(root.parent)
        return self.expected[ratio]

    def check(self, root: Path, ratio: float) -> None:
        """The same bytes as those of an undisturbed run, nothing else, and DVC content with it."""
        different = differing(self.undisturbed(ratio), contents(root))
        check(not different, f"other bytes: {different}")
        status = run(root, *DVC, "status")
        check("up to date" in status, status)
        check(not damaged_entries(root), f"damaged: {damaged_entries(root)}")


def met(*commands: Started, allowed: tuple[str, ...] = MET) -> str:
    """ "refused" if one of these ended without its work done, which it has to say in one of the ``allowed`` ways."""
    results = [command.ended() for command in commands]
    for status, output in results:
        check("Traceback" not in output, output)
        check(status == 0 or any(words in output for words in allowed), f"ended with {status}:\n{output}")
    return "refused" if any(status for status, _ in results) else "both"


def beside(projects: Projects, *commands: tuple[str, ...], allowed: tuple[str, ...] = MET) -> str:
    """Two commands at a random distance, in one workspace whose pipeline has to run; then the first once more."""
    projects.undisturbed(RATIO)
    root = projects.copy(RATIO)
    first, second = projects.draw.sample(commands, 2)
    one = Started(root, *first)
    time.sleep(projects.draw.random() * projects.length)
    found = met(one, Started(root, *second), allowed=allowed)
    run(root, *commands[0])
    projects.check(root, RATIO)
    if RUN in commands:
        check_runs(store(root), 1)
    return found


def run_while_locked(projects: Projects) -> None:
    """`drank run` while another DVC holds its lock for longer than DVC waits by itself, as a long `dvc status` does."""
    root = projects.copy()
    lock = zc.lockfile.LockFile(str(root / ".dvc/tmp/lock"))
    process = Started(root, *RUN)
    time.sleep(15)
    lock.close()
    met(process, allowed=())
    check_runs(store(root), 1)


def tracks(projects: Projects, n: int = 2) -> None:
    """`drank track` so often at once, on a database that is not there yet."""
    root = projects.copy()
    together(projects, [root] * n)
    check_runs(store(root), 1)


def two_promotions(projects: Projects) -> str:
    """One variant promoted twice at once: it is one version, MLflow's champion, with one tag."""
    root = projects.copy()
    processes = [Started(root, *DRANK, "promote", "kfac-80") for _ in range(2)]
    found = met(*processes, allowed=("`git tag` says",))
    check_runs(store(root), 1)
    client = MlflowClient(tracking_uri=store(root))
    versions = {v.version: v.tags["drank.variant"] for v in client.search_model_versions("name = 'drank'")}
    check(list(versions.values()) == ["kfac-80"], f"versions {versions}")
    check(client.get_model_version_by_alias("drank", "champion").version in versions, "no champion")
    check(run(root, "git", "tag").split() == ["champion@v1.0.0"], "not one tag")
    return found


def tracks_of_two_clones(projects: Projects) -> None:
    """`drank track` in two clones that are in the same state, on one database."""
    uri = f"sqlite:///{projects.scratch}/shared-{projects.n_copies}.db"
    together(projects, [projects.copy(), projects.copy()], MLFLOW_TRACKING_URI=uri)
    check_runs(uri, 1)


def tracks_on_a_server(projects: Projects) -> None:
    """Two clones on a server, while a third `drank track` writes to the server's own database, which it has made."""
    other, roots = projects.copy(), [projects.copy(0.6)]
    run(other, *TRACK)
    set_ratio(other, RATIO)
    for root in (other, *roots):
        run(root, *REPRO)
    roots.append(projects.scratch / str(projects.n_copies) / "clone")
    shutil.copytree(roots[0], roots[1], symlinks=True)
    with serving(store(other), other) as uri:
        directly = Started(other, *TRACK)
        together(projects, roots, MLFLOW_TRACKING_URI=uri)
        met(directly, allowed=())
        check_runs(uri, 3)


def track_during_repro(projects: Projects) -> str:
    """`drank track`, `audit`, `diff` and `promote` at random times of a `dvc repro` in the same workspace."""
    root, found = projects.copy(), set()
    run(root, *TRACK)
    set_ratio(root, RATIO)
    repro = Started(root, *REPRO)
    while not repro.ended_within(0):
        for command in projects.draw.sample(COMMANDS, len(COMMANDS)):
            found.add(met(Started(root, *DRANK, *command), allowed=("error: ", "does not hold")))
            check_runs(store(root))
    found.add(met(repro))
    run(root, *REPRO)
    run(root, *TRACK)
    check_runs(store(root), 2)
    projects.check(root, RATIO)
    return max(found)


COMMANDS = (("track",), ("audit", f"data/models/{VARIANT}"), ("diff", VARIANT, "kfac-80"), ("promote", VARIANT))


def one_stage_twice(projects: Projects) -> str:
    """One stage twice by hand, that writes a folder; and afterwards once more."""
    root = projects.copy()
    before, command = contents(root), (sys.executable, "-m", "stages.covariance", "0")
    first = projects.start(root, *command)
    projects.pause()
    found = met(first, projects.start(root, *command), allowed=("another process is writing this at the moment",))
    check(contents(root) == before, "other bytes")
    run(root, *command)
    check(contents(root) == before, "other bytes when typed again")
    return found


def two_experiments(projects: Projects) -> None:
    """Two experiments of DVC's queue at once, then taken over and logged one after the other."""
    root, ratios = projects.copy(), {"one": RATIO, "two": 0.6}
    for name, ratio in ratios.items():
        run(root, *DVC, "exp", "run", "--queue", "-n", name, "-S", f"variants.{VARIANT}.size_ratio={ratio}")
    try:
        run(root, *DVC, "queue", "start", "-j", "2")
        done = ""
        while done.count("Success") + done.count("Failed") < len(ratios):
            time.sleep(2)
            done = run(root, *DVC, "queue", "status")
        check(done.count("Success") == len(ratios), done)
    finally:
        run(root, *DVC, "queue", "stop", "--kill")
    for name, ratio in ratios.items():
        run(root, *DVC, "exp", "apply", name)
        run(root, *REPRO)
        projects.check(root, ratio)
        created = run(root, *TRACK), run(root, *TRACK)
        check("created: pipeline-" in created[0] and "created: none" in created[1], "\n".join(created))
    check_runs(store(root), len(ratios))


def together(projects: Projects, roots: list[Path], **variables: str) -> None:
    """`drank track` in each, at random distances: all end well, and one alone says that it logged the state."""
    started = []
    for root in roots:
        started.append(projects.start(root, *TRACK, **variables))
        projects.pause()
    results = [command.ended() for command in started]
    outputs = "\n".join(output for _, output in results)
    check(all(status == 0 for status, _ in results), outputs)
    check(outputs.count("created: pipeline-") == 1, outputs)
    check(outputs.count("created: none") == len(results) - 1, f"not said that it is there:\n{outputs}")


CASES: dict[str, Callable[[Projects], str | None]] = {
    "two dvc repro": partial(beside, REPRO, REPRO),
    "two drank run": partial(beside, RUN, RUN, allowed=()),
    "drank run and dvc repro": partial(beside, RUN, REPRO),
    "drank run, DVC locked": run_while_locked,
    "two drank track, new database": tracks,
    "four drank track, new database": partial(tracks, n=4),
    "two drank promote": two_promotions,
    "drank track of two clones": tracks_of_two_clones,
    "drank track on a server": tracks_on_a_server,
    "drank track during dvc repro": track_during_repro,
    "one stage twice by hand": one_stage_twice,
    "dvc queue start -j 2": two_experiments,
}


def tried(projects: Projects, case: str) -> tuple[str]:
    """A case, whose copies of the project are gone afterwards."""
    try:
        return (CASES[case](projects) or "both",)
    finally:
        for copy in projects.scratch.glob("[0-9]*"):
            shutil.rmtree(copy, ignore_errors=True)  # a lost case may leave a process at work


def main() -> None:
    cases = {"nargs": "*", "choices": CASES, "default": list(CASES), "help": "all where left out"}
    with campaign(__doc__, 120, ("tried", "both", "refused", "lost"), cases=cases) as work:
        projects = Projects(work.project(), work.scratch, work.asked.seed)
        work.try_each({case: partial(tried, projects, case) for case in work.asked.cases})


if __name__ == "__main__":
    main()
