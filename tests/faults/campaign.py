"""Shared by campaigns: a command line, counts that are told in the end, commands in a project, and their leftovers.

No module of pytest's: a campaign is ``python -m tests.faults.NAME``.
"""

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import psutil
import transformers
import typer
import yaml

from drank.project.dvc import dvc_md5
from drank.project.files import file_sha256, read_json
from drank.project.state import outs_of, sha256_of
from tests import tiny
from tests.conftest import PROGRAMS, QUIET, REPOSITORY, reproduce

DVC = (sys.executable, "-m", "dvc")
DRANK = ("drank",)
PATIENCE = 900  # seconds for a command that nobody disturbs
NOT_MADE = {".dvc", ".git", "__pycache__", "downloads"}
ENTRY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")


@dataclass
class Counts:
    """Counts by row and column of a table, and of what else was seen; ``told`` says how each loss came about."""

    rows: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seen: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def lost(self, what: str, message: object) -> None:
        self.seen[what] += 1
        self.told.append(f"{what}: {message}")
        typer.echo(f"    {self.told[-1]}", err=True)

    def show(self, columns: Sequence[str]) -> None:
        total = sum(self.rows.values(), Counter())
        columns = columns or sorted(total)
        typer.echo(f"{'':32}" + "".join(f"{column:>11}" for column in columns))
        for name, row in [*self.rows.items(), ("all", total)]:
            typer.echo(f"{name:32}" + "".join(f"{row[column]:11}" for column in columns))
        for what, n in sorted(self.seen.items()):
            typer.echo(f"{n:6} {what}")


@dataclass
class Campaign:
    """A campaign's command line, and where it works."""

    asked: argparse.Namespace
    scratch: Path
    counts: Counts

    def project(self, sources: Callable[[Path], None] = tiny.project) -> Path:
        """A reproduced project to copy."""
        if self.asked.project is None:
            self.asked.project = self.scratch / "project"
            reproduce(self.asked.project, sources)
        return self.asked.project

    def try_each(self, cases: Mapping[str, Callable[[], Iterable[str]]]) -> None:
        """One case after the other, around and around, as often as asked: each names the columns that it counts in."""
        for name, case in islice(cycle(cases.items()), self.asked.n):
            self.counts.rows[name]["tried"] += 1
            try:
                self.counts.rows[name].update(case())
            except Lost as error:
                self.counts.rows[name]["lost"] += 1
                self.counts.lost(name, error)


@contextmanager
def campaign(doc: str | None, n: int, columns: Sequence[str] = (), **options: dict) -> Iterator[Campaign]:
    """Read the command line, and show the counts however the campaign ends; processes that it left are killed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=n, help=f"how often; {n} where left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--project", type=Path, help="a reproduced project to copy; made where left out")
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    asked = parser.parse_args()
    quieten()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="drank-faults-") as scratch:
        work = Campaign(asked, Path(scratch), Counts())
        try:
            yield work
        finally:
            if work.counts.rows:
                work.counts.show(columns)
            kill(*psutil.Process().children(recursive=True))


def quieten() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    os.environ["PIP_NO_INDEX"] = "1"  # a damaged wheel cannot be fetched again


class Lost(Exception):
    """Something happened that should not."""


def check(holds: object, what: object) -> None:
    if not holds:
        raise Lost(what)


# Commands


class Started:
    """A command in a project, in a session of its own, with all that it says in a file beside the project.

    Its processes are real ones, unless they are to be ``quick``: then pytest's forks, where it has some.
    """

    def __init__(self, root: Path, *command: str, quick: bool = False, umask: int = -1, **variables: str) -> None:
        number, name = tempfile.mkstemp(".log", dir=root.parent)  # an orphan goes on writing to its own
        self.log = Path(name)
        programs = Path(os.environ[PROGRAMS] if quick and PROGRAMS in os.environ else Path(sys.executable).parent)
        command = tuple(str(programs / "python") if word == sys.executable else word for word in command)
        with os.fdopen(number, "wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=root, env=environment(root, programs) | variables, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, umask=umask,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended_within(self, seconds: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def ended(self) -> tuple[int, str]:
        """Status and output, when it has ended; a command that never ends is killed."""
        if not self.ended_within(PATIENCE):
            self.kill()
        return self.process.returncode, self.output

    def descendants(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def kill(self) -> None:
        kill(self.process, *self.descendants())
        self.process.wait()

    def message(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or line.startswith("error:") or "Traceback" in line]
        return " | ".join((errors or lines)[-2:])


def environment(root: Path, programs: Path) -> dict[str, str]:
    """Ours, with these programs first, and with what DVC notes of a project beside it."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))} | QUIET | {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": f"{root}{os.pathsep}{REPOSITORY}",
        "DVC_SITE_CACHE_DIR": str(root.with_name(f"{root.name}.site")),
    }  # fmt: skip


def run(root: Path, *command: str, quick: bool = True, umask: int = -1, **variables: str) -> str:
    """The output of a command that has to succeed."""
    status, output = Started(root, *command, quick=quick, umask=umask, **variables).ended()
    check(status == 0, f"{' '.join(command[-3:])} ended with {status}:\n{output}")
    return output


def kill(*processes: psutil.Process | subprocess.Popen) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


# Leftovers


def change(root: Path, **sections: object) -> None:
    """Other sections of params.yaml."""
    document = yaml.safe_load((root / "params.yaml").read_text()) | sections
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def contents(root: Path, *paths: str) -> dict[str, str]:
    """SHA-256 by name of every file, hidden or not, that the pipeline makes, or that lies under these paths."""
    folders = [root / path for path in paths or ("dvc.lock", "data", "results")]
    files = {f.relative_to(root): f for folder in folders for f in (folder, *folder.rglob("*")) if f.is_file()}
    return {str(name): file_sha256(file) for name, file in files.items() if not NOT_MADE & {*name.parts}}


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of files that are other bytes, or on one side alone."""
    return sorted({name for name, _ in expected.items() ^ found.items()})


def damaged_entries(root: Path) -> list[str]:
    """Files of DVC's cache whose bytes are not those of their name, its leftovers among them."""
    cache = root / ".dvc/cache/files/md5"
    entries = {str(file.relative_to(cache)): file for file in cache.rglob("*") if file.is_file()}
    hashes = {name: name.removesuffix(".dir").replace("/", "") for name in entries}
    return [n for n, file in entries.items() if not ENTRY.fullmatch(n) or dvc_md5(file) != hashes[n]]


def check_runs(uri: str, n_states: int | None = None) -> None:
    """MLflow's store has every state once, with every variant once; figures and files are those of their state."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("drank")
    check(experiment is not None, "no experiment")
    runs = client.search_runs([experiment.experiment_id])
    check(all(run.info.status == "FINISHED" for run in runs), "a run that is not finished")
    above = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    states = [run for run in runs if above[run.info.run_id] is None]
    hashes = [state.data.tags["dvc.lock_sha256"] for state in states]
    check(len(set(hashes)) == len(hashes), "a state twice")
    check(n_states is None or len(hashes) == n_states, f"{len(hashes)} states")
    for state in states:
        with downloaded(client, state) as files:
            lock = yaml.safe_load((files / "dvc.lock").read_text())["stages"]
            check(sha256_of(lock) == state.data.tags["dvc.lock_sha256"], "dvc.lock of another state")
            outs = outs_of(lock)
            for name in ("summary.csv", "report.html", "figures"):
                check(dvc_md5(files / name) == outs[f"results/{name}"], f"{name} of another state")
            variants = yaml.safe_load((files / "params.yaml").read_text())["variants"]
        children = [run for run in runs if above[run.info.run_id] == state.info.run_id]
        names = sorted(child.info.run_name for child in children)
        check(names == sorted(variants), f"variants {names}")
        for child in children:
            check_variant(client, child, outs, variants[child.info.run_name])


def check_variant(client, run, outs: dict[str, str], variant: dict) -> None:
    name, metrics = run.info.run_name, run.data.metrics
    with downloaded(client, run) as files:
        for logged, made in (
            (f"results/{name}.json",) * 2,
            (f"allocation/{name}.json", f"data/allocation/{name}.json"),
        ):
            check(dvc_md5(files / logged) == outs[made], f"{logged} of another state")
        check({"ranks.json", "ranks.png"} <= {file.name for file in files.iterdir()}, f"{name}: not all files")
        figures = read_json(files / f"results/{name}.json")
    check(metrics and all(metrics[key] == figures[key] for key in metrics if key in figures), "metrics of another")
    check(run.data.params["size_ratio"] == str(variant["size_ratio"]), "parameters of another")
    check(run.data.tags["model.dvc_md5"] == outs[f"data/models/{name}"], "a model of another")


@contextmanager
def downloaded(client, run) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(client.download_artifacts(run.info.run_id, "", folder))
