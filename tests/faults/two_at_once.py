"""Two commands at once in one project, or on one store of MLflow, started at random distances; what is left of it.

``python -m tests.faults.two_at_once --n 10`` makes a small project, tries every case so often and prints a table::

    tried      how often
    both       both did their work: one waited for the other, or they did not meet
    refused    one or both ended with a message and wrote nothing wrong; the command that is typed again succeeds
    lost       a traceback, a message that says nothing, other bytes than those of an undisturbed run, a damaged entry
               of the cache, a leftover, a run of MLflow that is missing, there twice, or a mixture of two states
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import typer
import yaml
import zc.lockfile
from mlflow import MlflowClient

from drank.project.dvc import dvc_md5
from drank.project.files import read_json
from drank.project.state import outs_of, sha256_of
from tests.conftest import reproduce

VARIANT = "d-rank-80"
DVC = (sys.executable, "-m", "dvc")
DRANK = (sys.executable, "-c", "from drank.cli import app; app()")
# What DVC says when two of it meet: both sentences name what is in the way and what to do.
MET = ("is busy, it is being blocked by", "Unable to acquire lock. Most likely another DVC process is running")


class Lost(Exception):
    """What should not have happened."""


def start(root: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_TRACKING", "DVC_R"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate()[0]
    return process.returncode, output


def run(root: Path, *command: str, **variables: str) -> str:
    status, output = ended(start(root, *command, **variables))
    if status != 0:
        raise Lost(f"{' '.join(command[-3:])} ended with {status}:\n{output}")
    return output


def check(holds: object, what: str) -> None:
    if not holds:
        raise Lost(what)


def set_ratio(root: Path, ratio: float) -> None:
    document = yaml.safe_load((root / "params.yaml").read_text())
    document["variants"][VARIANT]["size_ratio"] = ratio
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def content(root: Path) -> dict[str, str]:
    """Hashes of all that the pipeline wrote, leftovers included."""
    files = [root / "dvc.lock", *(file for folder in ("data", "results") for file in (root / folder).rglob("*"))]
    return {f.relative_to(root).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def damaged_entries(root: Path) -> list[str]:
    """Files of DVC's cache whose bytes are not those of their name."""
    entries = [file for file in (root / ".dvc/cache/files/md5").rglob("*") if file.is_file()]
    return [str(f) for f in entries if dvc_md5(f) != (f.parent.name + f.name).removesuffix(".dir")]


def runs_of(uri: str) -> tuple[MlflowClient, list, dict[str, list]]:
    """The runs of states in a store, and those of variants by the run above them."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("drank")
    check(experiment is not None, "no experiment")
    runs = client.search_runs([experiment.experiment_id])
    check(all(run.info.status == "FINISHED" for run in runs), "a run that is not finished")
    variants: dict[str, list] = {}
    for found in runs:
        if "mlflow.parentRunId" in found.data.tags:
            variants.setdefault(found.data.tags["mlflow.parentRunId"], []).append(found)
    return client, [found for found in runs if "mlflow.parentRunId" not in found.data.tags], variants


def check_runs(uri: str, n_states: int | None = None) -> None:
    """Every state once, every variant of it once, and every figure and file of it that state's."""
    client, states, variants = runs_of(uri)
    hashes = [state.data.tags["dvc.lock_sha256"] for state in states]
    check(len(set(hashes)) == len(hashes), "a state twice")
    check(n_states is None or len(hashes) == n_states, f"{len(hashes)} states")
    for state in states:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(client.download_artifacts(state.info.run_id, "", folder))
            lock = yaml.safe_load((files / "dvc.lock").read_text())["stages"]
            check(sha256_of(lock) == state.data.tags["dvc.lock_sha256"], "dvc.lock of another state")
            outs = outs_of(lock)
            for path, logged in (
                ("results/summary.csv", "summary.csv"),
                ("results/report.html", "report.html"),
                ("results/figures", "figures"),
            ):
                check(dvc_md5(files / logged) == outs[path], f"{logged} of another state")
            params = yaml.safe_load((files / "params.yaml").read_text())
        children = variants[state.info.run_id]
        names = sorted(child.info.run_name for child in children)
        check(names == sorted(params["variants"]), f"variants {names}")
        for child in children:
            with tempfile.TemporaryDirectory() as folder:
                files, name = Path(client.download_artifacts(child.info.run_id, "", folder)), child.info.run_name
                check(dvc_md5(files / f"results/{name}.json") == outs[f"results/{name}.json"], "results of another")
                allocation = f"allocation/{name}.json"
                check(dvc_md5(files / allocation) == outs[f"data/{allocation}"], "allocation of another")
                figures = read_json(files / f"results/{name}.json")
            metrics = child.data.metrics
            check(all(metrics[key] == figures[key] for key in metrics if key in figures), "metrics of another")
            ratio = str(params["variants"][name]["size_ratio"])
            check(child.data.params["size_ratio"] == ratio, "parameters of another")
            check(child.data.tags["model.dvc_md5"] == outs[f"data/models/{name}"], "a model of another")


class Projects:
    """Copies of one reproduced project, and what undisturbed runs make of it."""

    def __init__(self, project: Path, scratch: Path, seed: int) -> None:
        self.project, self.scratch = project, scratch
        self.draw = random.Random(seed)
        self.expected: dict[float, dict[str, str]] = {}
        self.lengths: dict[str, float] = {}
        self.n_copies = 0

    def copy(self, ratio: float | None = None) -> Path:
        self.n_copies += 1
        root = self.scratch / str(self.n_copies) / "project"
        shutil.copytree(self.project, root, symlinks=True)
        if ratio is not None:
            set_ratio(root, ratio)
        return root

    def undisturbed(self, ratio: float) -> dict[str, str]:
        """What one `dvc repro` makes of this ratio; how long it takes is remembered."""
        if ratio not in self.expected:
            root = self.copy(ratio)
            before = time.monotonic()
            run(root, *DVC, "repro")
            self.lengths["repro"] = time.monotonic() - before
            self.expected[ratio] = content(root)
            shutil.rmtree(root.parent)
        return self.expected[ratio]

    def pause(self, of: str) -> None:
        time.sleep(self.draw.random() * self.lengths.get(of, 0.0))

    def check(self, root: Path, ratio: float) -> None:
        """The same bytes as those of an undisturbed run, nothing else, and DVC content with it."""
        expected, found = self.undisturbed(ratio), content(root)
        different = sorted(name for name, _ in found.items() ^ expected.items())
        check(not different, f"other bytes: {different}")
        status = run(root, *DVC, "status")
        check("up to date" in status, status)
        check(not damaged_entries(root), f"damaged: {damaged_entries(root)}")


def met(root: Path, *results: tuple[int, str], allowed: tuple[str, ...] = MET) -> bool:
    """Whether one of these ended without its work done, which it has to say; what it says is one of ``allowed``."""
    for status, output in results:
        check("Traceback" not in output, output)
        check(status == 0 or any(words in output for words in allowed), f"ended with {status}:\n{output}")
    return any(status != 0 for status, _ in results)


def two_repros(projects: Projects) -> str:
    """Two `dvc repro` in one workspace."""
    ratio = 0.7
    projects.undisturbed(ratio)
    root = projects.copy(ratio)
    first = start(root, *DVC, "repro")
    projects.pause("repro")
    second = start(root, *DVC, "repro")
    refused = met(root, ended(first), ended(second))
    run(root, *DVC, "repro")
    projects.check(root, ratio)
    return "refused" if refused else "both"


def two_runs(projects: Projects) -> str:
    """Two `drank run`: the second waits, and finds everything done."""
    ratio = 0.7
    projects.undisturbed(ratio)
    root = projects.copy(ratio)
    first = start(root, *DRANK, "run")
    projects.pause("repro")
    second = start(root, *DRANK, "run")
    results = ended(first), ended(second)
    check(not met(root, *results, allowed=()), "refused")
    projects.check(root, ratio)
    check_runs(f"sqlite:///{root}/mlflow.db", 1)
    return "both"


def run_beside_repro(projects: Projects) -> str:
    """`drank run` while `dvc repro` runs, or the other way round."""
    ratio = 0.7
    projects.undisturbed(ratio)
    root = projects.copy(ratio)
    commands = [(*DRANK, "run"), (*DVC, "repro")]
    projects.draw.shuffle(commands)
    first = start(root, *commands[0])
    projects.pause("repro")
    second = start(root, *commands[1])
    refused = met(root, ended(first), ended(second), allowed=MET)
    run(root, *DRANK, "run")
    projects.check(root, ratio)
    check_runs(f"sqlite:///{root}/mlflow.db", 1)
    return "refused" if refused else "both"


def run_while_locked(projects: Projects) -> str:
    """`drank run` while another DVC holds its lock for longer than DVC waits by itself, as a long `dvc status` does."""
    root = projects.copy()
    lock = zc.lockfile.LockFile(str(root / ".dvc/tmp/lock"))
    process = start(root, *DRANK, "run")
    time.sleep(15)
    lock.close()
    check(not met(root, ended(process), allowed=()), "refused")
    check_runs(f"sqlite:///{root}/mlflow.db", 1)
    return "both"


def two_tracks(projects: Projects, n: int = 2) -> str:
    """`drank track` so often at once, on a database that is not there yet."""
    root = projects.copy()
    check_said(start_together(projects, [root] * n))
    check_runs(f"sqlite:///{root}/mlflow.db", 1)
    return "both"


def four_tracks(projects: Projects) -> str:
    return two_tracks(projects, 4)


def audit_beside_first_track(projects: Projects) -> str:
    """`drank audit` again and again, which looks for runs, while the first `drank track` makes the database."""
    root = projects.copy()
    track = start(root, *DRANK, "track")
    while track.poll() is None:
        result = ended(start(root, *DRANK, "audit", f"data/models/{VARIANT}"))
        check(result[0] == 0, result[1])
    check_said([track])
    check_runs(f"sqlite:///{root}/mlflow.db", 1)
    return "both"


def two_promotions(projects: Projects) -> str:
    """Two variants promoted at once: both are versions, and MLflow's champion is one of them."""
    root = projects.copy()
    processes = [start(root, *DRANK, "promote", name) for name in (VARIANT, "kfac-80")]
    refused = met(root, *map(ended, processes), allowed=("error: git tag",))
    check_runs(uri := f"sqlite:///{root}/mlflow.db", 1)
    client = MlflowClient(tracking_uri=uri)
    versions = {v.version: v.tags["drank.variant"] for v in client.search_model_versions("name = 'drank'")}
    check(sorted(versions.values()) == [VARIANT, "kfac-80"], f"versions {versions}")
    check(client.get_model_version_by_alias("drank", "champion").version in versions, "no champion")
    return "refused" if refused else "both"


def tracks_of_two_clones(projects: Projects) -> str:
    """`drank track` in two clones that are in the same state, on one database."""
    roots = [projects.copy(), projects.copy()]
    uri = f"sqlite:///{projects.scratch}/shared-{projects.n_copies}.db"
    check_said(start_together(projects, roots, MLFLOW_TRACKING_URI=uri))
    check_runs(uri, 1)
    return "both"


def tracks_on_a_server(projects: Projects) -> str:
    """Two clones on a server, while a third `drank track` writes to the server's own database, which it has made."""
    roots, other = [projects.copy(), projects.copy()], projects.copy()
    database = f"sqlite:///{other}/mlflow.db"
    run(other, *DRANK, "track")
    set_ratio(other, 0.7)
    run(other, *DVC, "repro")
    for root in roots:
        set_ratio(root, 0.6)
    run(roots[0], *DVC, "repro")
    for path in ("data", "results", "dvc.lock"):
        run(roots[1], "rm", "-r", path)
        run(roots[1], "cp", "-a", str(roots[0] / path), path)
    with server(other) as uri:
        processes = start_together(projects, roots, MLFLOW_TRACKING_URI=uri)
        directly = start(other, *DRANK, "track", MLFLOW_TRACKING_URI=database)
        check_said(processes)
        status, output = ended(directly)
        check(status == 0, output)
        check_runs(uri, 3)
    return "both"


def track_during_repro(projects: Projects) -> str:
    """`drank track`, `audit`, `diff` and `promote` at random times of a `dvc repro` in the same workspace."""
    ratio = 0.7
    projects.undisturbed(ratio)
    root = projects.copy()
    run(root, *DRANK, "track")
    set_ratio(root, ratio)
    repro, refused = start(root, *DVC, "repro"), False
    while repro.poll() is None:
        for command in projects.draw.sample(COMMANDS, len(COMMANDS)):
            status, output = ended(start(root, *DRANK, *command))
            check("Traceback" not in output, output)
            said = "error: " in output or "does not hold" in output
            check(status == 0 or said, f"{command} ended with {status}:\n{output}")
            refused |= status != 0
            check_runs(f"sqlite:///{root}/mlflow.db")
    result = ended(repro)
    refused |= met(root, result)
    run(root, *DVC, "repro")
    run(root, *DRANK, "track")
    check_runs(f"sqlite:///{root}/mlflow.db", 2)
    projects.check(root, ratio)
    return "refused" if refused else "both"


COMMANDS = (("track",), ("audit", f"data/models/{VARIANT}"), ("diff", VARIANT, "kfac-80"), ("promote", VARIANT))


def one_stage_twice(projects: Projects) -> str:
    """One stage twice by hand, that writes a folder; and afterwards once more."""
    root = projects.copy()
    before = content(root)
    command = (sys.executable, "-m", "stages.covariance", "0")
    first = start(root, *command)
    time.sleep(projects.draw.random())
    second = start(root, *command)
    refused = met(root, ended(first), ended(second), allowed=("another process is writing this at the moment",))
    check(content(root) == before, "other bytes")
    run(root, *command)
    check(content(root) == before, "other bytes when typed again")
    return "refused" if refused else "both"


def two_experiments(projects: Projects) -> str:
    """Two experiments of DVC's queue at once, then taken over and logged one after the other."""
    ratios = {"one": 0.7, "two": 0.6}
    for ratio in ratios.values():
        projects.undisturbed(ratio)
    root = projects.copy()
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
        run(root, *DVC, "repro")
        projects.check(root, ratio)
        created = run(root, *DRANK, "track"), run(root, *DRANK, "track")
        check("created: pipeline-" in created[0] and "created: none" in created[1], "\n".join(created))
    check_runs(f"sqlite:///{root}/mlflow.db", len(ratios))
    return "both"


def start_together(projects: Projects, roots: list[Path], **variables: str) -> list[subprocess.Popen[str]]:
    processes = []
    for root in roots:
        processes.append(start(root, *DRANK, "track", **variables))
        time.sleep(projects.draw.random() * 2 if projects.draw.random() < 0.5 else 0)
    return processes


def check_said(processes: list[subprocess.Popen[str]]) -> None:
    """All ended well, and one alone says that it logged the state."""
    results = [ended(process) for process in processes]
    check(all(status == 0 for status, _ in results), "\n".join(output for _, output in results))
    created = sum("created: pipeline-" in output for _, output in results)
    check(created == 1, "\n".join(output for _, output in results))
    check(sum("created: none" in output for _, output in results) == len(results) - 1, "not said that it is there")


@contextlib.contextmanager
def server(root: Path) -> Iterator[str]:
    """`mlflow server` on the database of a project, on this machine only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    places = (
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "mlartifacts"),
    )
    command = (sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    process = subprocess.Popen(
        [*command, *places], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{uri}/health").close()
                break
            time.sleep(0.1)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


CASES: dict[str, Callable[[Projects], str]] = {
    "two dvc repro": two_repros,
    "two drank run": two_runs,
    "drank run and dvc repro": run_beside_repro,
    "drank run, DVC locked": run_while_locked,
    "two drank track, new database": two_tracks,
    "four drank track, new database": four_tracks,
    "drank audit, first drank track": audit_beside_first_track,
    "two drank promote": two_promotions,
    "drank track of two clones": tracks_of_two_clones,
    "drank track on a server": tracks_on_a_server,
    "drank track during dvc repro": track_during_repro,
    "one stage twice by hand": one_stage_twice,
    "dvc queue start -j 2": two_experiments,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10, help="tries of every case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="all where left out")
    parser.add_argument("--project", type=Path, help="a reproduced project to copy; made where left out")
    asked = parser.parse_args()
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    counts: dict[str, Counter[str]] = {case: Counter() for case in asked.cases}
    with tempfile.TemporaryDirectory() as scratch:
        project = asked.project or Path(scratch) / "project"
        if asked.project is None:
            reproduce(project)
        projects = Projects(project, Path(scratch), asked.seed)
        for _ in range(asked.n):
            for case in asked.cases:
                try:
                    found = CASES[case](projects)
                except Lost as error:
                    found = "lost"
                    typer.echo(f"{case}: {error}", err=True)
                for copy in Path(scratch).glob("[0-9]*"):
                    shutil.rmtree(copy, ignore_errors=True)  # a lost case may leave a process at work
                counts[case].update(tried=1, **{found: 1})
                typer.echo(f"{case}: {dict(counts[case])}", err=True)
    columns = ("tried", "both", "refused", "lost")
    typer.echo(f"{'':32}" + "".join(f"{column:>9}" for column in columns))
    for case, row in counts.items():
        typer.echo(f"{case:32}" + "".join(f"{row[column]:9}" for column in columns))


if __name__ == "__main__":
    main()
