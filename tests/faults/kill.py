"""SIGKILL at random times, again and again, and whether what comes out in the end is what an undisturbed run makes.

``python -m tests.faults.kill --n 100 --seed 0`` prints what was killed, how often, and what came of it::

    pipeline    ``dvc repro`` in a fresh clone, typed again after each kill until it ends well; then every byte of
                data/, results/ and dvc.lock is compared, and the next clone is begun. Killed are all processes (as if
                the machine was switched off, but the disk keeps what was written), the stage alone (as by the system
                when memory runs out), or the first process alone, DVC, whose stage is then an orphan while the next
                run starts.
    track       ``drank track`` on a new database; afterwards one run per variant, all of them whole.

``--model tiny`` takes the model of the tests, ``--model default`` that of params.yaml with few and short windows.
"""

import math
import os
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import typer
import yaml

from drank.project.command import runs
from drank.project.damage import find_torn
from tests import tiny
from tests.conftest import REPOSITORY, sow
from tests.faults.campaign import (
    DRANK,
    DVC,
    Counts,
    Lost,
    Started,
    campaign,
    check_runs,
    contents,
    damaged_entries,
    differing,
    kill,
)  # fmt: skip

STARTED = re.compile(r"^(?:Running stage|Stage) '([^'@]+)", re.MULTILINE)
TEMPORARY = re.compile(r"\.partial|\.old|\.offloaded-|\.checkpoint|\.tmp|\.unpacked")
HEALING = {
    "objective": "text", "n_windows": 4, "window_length": 32, "epochs": 1, "batch_windows": 2,
    "learning_rate": 1.0e-3, "rank": 2, "alpha": 8, "threads": 1,
}  # fmt: skip


def sources(root: Path, model: str) -> None:
    """Model, texts and params.yaml, with a variant that is healed; two layers of the default model are compressed."""
    if model == "tiny":
        tiny.project(root)
        document = yaml.safe_load((root / "params.yaml").read_text())
    else:
        shutil.copytree(REPOSITORY / "data/downloads", root / "data/downloads", copy_function=os.link)
        document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
        document["sampling"] |= {"n_windows": 4, "window_length": 64, "n_test_windows": 2, "n_task_items": 4}
        document["covariance"] |= {"threads": 1, "targets": [r"re:model\.layers\.[01]\."]}
        document["evaluation"] |= {"threads": 1, "tasks": ["last_word", "next_sentence"]}
        document["variants"] = {name: document["variants"][name] for name in ("d-rank-80", "kfac-80")}
    document["variants"]["kfac-80-healed"] = document["variants"]["kfac-80"] | {"healing": HEALING}
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


class Repro:
    """Clones of a project, in each of which a command is killed and typed again until it ends well: ``dvc repro``.

    Attributes:
        seconds: between the beginning of the work and a kill, at most.
        expected: what an undisturbed run leaves; where it is empty, what the first clone leaves.
        orphans: processes that were not killed with the one that started them.
    """

    command = (*DVC, "repro")
    ways = ("all", "stage", "first")

    def __init__(self, copy: Callable[[Path], object], scratch: Path, counts: Counts, seed: int = 0) -> None:
        self.copy, self.scratch, self.counts, self.draw = copy, scratch, counts, random.Random(seed)
        self.seconds, self.n_clones, self.n_kills = 8.0, 0, 0
        self.expected: dict[str, str] = {}
        self.orphans: list[psutil.Process] = []

    def campaign(self, n: int) -> None:
        """An undisturbed run, then clones until so many kills were made."""
        begun = time.monotonic()
        self.clone(0)
        self.seconds = time.monotonic() - begun
        while self.n_kills < n:
            self.clone(n - self.n_kills)
            typer.echo(f"{self.n_kills} kills, {self.n_clones} clones: {dict(self.counts.seen)}")

    def clone(self, n_kills: int) -> None:
        """A clone, killed at most so often, to the end."""
        root = self.scratch / f"clone-{self.n_clones}"
        self.n_clones += 1
        self.copy(root)
        try:
            self.to_the_end(root, n_kills)
            self.judge(root)
        except Lost as error:
            self.counts.lost("lost", error)
        shutil.rmtree(root)

    def to_the_end(self, root: Path, n_kills: int) -> None:
        for refused in range(10):
            run = self.started(root, n_kills)
            while n_kills and self.strike(run, root):
                n_kills -= 1
                run = self.started(root, n_kills)
            if run.ended()[0] == 0:
                return
            if not self.repair(root):
                self.counts.lost("next run refused", run.message())
            time.sleep(refused)
        raise Lost(f"given up: {root}")

    def started(self, root: Path, n_kills: int) -> Started:
        shell = self.draw.choice(["/bin/sh", "/bin/bash"])
        return Started(root, *self.command, quick=not n_kills, SHELL=shell)

    def at_work(self, run: Started, root: Path) -> bool:
        """True while the command does the work that it is to be killed at."""
        return "Running stage" in run.output

    def strike(self, run: Started, root: Path) -> bool:
        """Kill at some moment, one time in ten before the work; whether the command was still running.

        Moments are uniform in the logarithm of seconds, so that short stages and long ones are met.
        """
        early = self.draw.random() < 0.1
        while not early and not self.at_work(run, root):
            if run.ended_within(0.01):
                return False
        if alive(self.orphans):
            self.counts.seen["began beside an orphan"] += 1
        if run.ended_within(math.exp(self.draw.uniform(math.log(0.02), math.log(self.seconds)))):
            return False
        way, everyone = self.ways[self.n_kills % len(self.ways)], run.descendants()
        victims = {"first": [run.process], "stage": stages_of(everyone)}.get(way) or [run.process, *everyone]
        kill(*victims)
        self.n_kills += 1
        phase = [type(self).__name__.lower(), *STARTED.findall(run.output)][-1]
        self.counts.rows[phase][way] += 1
        self.orphans += [process for process in everyone if process not in victims]
        if not run.ended_within(60):
            self.counts.lost("hangs without what was killed", run.message())
            run.kill()
        elif run.process.returncode == 0:
            self.counts.seen["killed after its work was done"] += 1
        return True

    def repair(self, root: Path) -> bool:
        """Remove what DVC writes in place and a kill has torn, as `drank check --mend` does; true if there was any."""
        torn = find_torn(root)
        for path in torn:
            path.unlink()
            self.counts.seen[f"torn while DVC wrote it, removed: {path.name}"] += 1
        return bool(torn)

    def judge(self, root: Path) -> None:
        """Compare the end with that of an undisturbed run."""
        orphans = alive(self.orphans, seconds=45)  # one that waits for a lost peer in C ends after 30
        found = contents(root)
        self.expected = self.expected or found
        self.counts.seen["files compared"] += len(found)
        wrong = {
            "files that differ": differing(self.expected, found),
            "left behind": [str(file) for d in ("data", "results", ".dvc/cache/runs") for file in (root / d).rglob("*")
                            if file.is_file() and TEMPORARY.search(str(file.relative_to(root)))],
            "cache entries damaged": damaged_entries(root),
            "orphans left": orphans,
        }  # fmt: skip
        for what, names in wrong.items():
            for name in names:
                self.counts.lost(what, name)


class Track(Repro):
    """``drank track`` on a new database, then once more."""

    command, ways = (*DRANK, "track"), ("all",)

    def at_work(self, run: Started, root: Path) -> bool:
        return any(root.glob("*mlflow.db*"))

    def judge(self, root: Path) -> None:
        super().judge(root)
        status, output = Started(root, *self.command, quick=True).ended()
        if status or "MLflow runs created: none" not in output:
            self.counts.lost("tracked twice", output)
        with sqlite3.connect(root / "mlflow.db") as database:
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                self.counts.lost("database damaged", root)
        check_runs(f"sqlite:///{root}/mlflow.db", 1)


def stages_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Processes that run a stage, without the shells around them."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if any(word.startswith("stages.") for word in process.cmdline()):
                found.append(process)
    return found


def alive(processes: list[psutil.Process], seconds: float = 0) -> list[psutil.Process]:
    """Processes that still run after so long."""
    end = time.monotonic() + seconds
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def main() -> None:
    options = {
        "what": {"choices": ("pipeline", "track"), "default": "pipeline"},
        "model": {"choices": ("tiny", "default"), "default": "tiny"},
    }
    with campaign(__doc__, 100, **options) as work:
        made, given = partial(sources, model=work.asked.model), (work.scratch, work.counts, work.asked.seed)
        if work.asked.what == "pipeline":
            Repro(partial(sow, sources=made), *given).campaign(work.asked.n)
        else:
            Track(partial(shutil.copytree, work.project(made), symlinks=True), *given).campaign(work.asked.n)


if __name__ == "__main__":
    main()
