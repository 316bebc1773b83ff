"""Which stages ``dvc repro`` is about to run, about how long each takes here, and where in the whole it is.

DVC's own dry run looks at the workspace as it is, so it misses a stage that runs because one before it will. Here the
future outputs of a stage count for the stages behind it: by their hashes where DVC's cache has them, else as unknown. A
stage behind an unknown file may still be skipped, if that file comes out as it was: a plan is at most.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

UNKNOWN = None
TIMELESS = "time is told when the model is there"
STAGE = re.compile(r"(?P<running>Running )?[Ss]tage '(?P<name>[^']+)'(:| is cached| didn't change)")


class Plan:
    """The stages that are left, by about how many seconds each takes; None where that is not known yet.

    Args:
        say: takes what a person is told, a line or more.
    """

    def __init__(self, root: Path, targets: Iterable[str], say: Callable[[str], None]) -> None:
        self.root, self.say = root, say
        self.machine = ""  # what was measured of it, while nothing ran
        names = planned(root, targets)
        self.left: dict[str, float | None] = dict.fromkeys(names or ())
        self.n_stages = len(self.left)
        if self.left:  # now, even for a model that is yet to come: beside a stage half the speed would be measured
            self._estimate()
        if names is not None:
            self.say(self.table())

    def table(self) -> str:
        """Stages that will run."""
        if not self.left:
            return "nothing to run: every stage is up to date"
        if None in self.left.values():
            return f"{counted(self.left)} to run ({TIMELESS}): {', '.join(self.left)}"
        width = max(map(len, self.left))
        rows = [f"  {name:{width}}  {duration(seconds or 0.0)}" for name, seconds in self.left.items()]
        return "\n".join([f"{counted(self.left)} to run, about {duration(self._sum())} here:", *rows])

    def follow(self, line: str) -> None:
        """Take in a line of what ``dvc repro`` says; where a stage begins, say which it is of how many."""
        found = STAGE.match(line)
        if not found or found["name"] not in self.left:
            return
        name = found["name"]
        if found["running"] and None in self.left.values() and "raw" not in self.left and self._estimate():
            self.say(self.table())
        position = f"[{self.n_stages - len(self.left) + 1} of {self.n_stages}] {name}"
        left, seconds = self._sum(), self.left.pop(name)
        if found["running"]:
            timed = "" if seconds is None else f", about {duration(seconds)}; about {duration(left)} left"
            self.say(position + timed)

    def _sum(self) -> float:
        return sum(seconds or 0.0 for seconds in self.left.values())

    def _estimate(self) -> bool:
        """Give every stage its time; whether that was possible."""
        folder = model_folder(self.root, fetched="raw" not in self.left)
        if folder is None and self.machine:
            return False
        command = [sys.executable, "-m", "drank.planning.estimate", str(folder or ""), self.machine]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        if done.returncode:  # a stage will say what is wrong
            return False
        found = json.loads(done.stdout)
        self.machine = json.dumps(found["machine"])
        if seconds := found["seconds"]:
            self.left = {name: seconds.get(name, 0.0) for name in self.left}
        return bool(seconds)


def model_folder(root: Path, fetched: bool) -> Path | None:
    """Where the model's config.json is: in data/raw/model once that was ``fetched``, or where it will come from."""
    from drank.project.params import ParamsError, read_params

    try:
        scheme, _, name = read_params(root / "params.yaml").model.source.partition(":")
        folder = root / "data/raw/model" if fetched else root / Path(name).expanduser()
        return folder.resolve() if (fetched or scheme == "local") and (folder / "config.json").is_file() else None
    except (ParamsError, OSError, RuntimeError, ValueError):
        return None


def counted(stages: Iterable[str]) -> str:
    """How many at most: a stage behind one whose output comes out as before is skipped."""
    n = len(list(stages))
    return "1 stage" if n == 1 else f"up to {n} stages"


def duration(seconds: float) -> str:
    """As exactly as an estimate deserves: ``5 s``, ``40 s``, ``3 min``, ``1.5 h``."""
    if seconds < 95:
        return f"{max(1, round(seconds, 0 if seconds < 10 else -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def planned(root: Path, targets: Iterable[str]) -> list[str] | None:
    """Names of the stages that ``dvc repro TARGET...`` will run at most, in its order; None if that cannot be told.

    In a process of its own, since DVC reads targets relative to the working directory. Mistakes in a project are left
    for ``dvc repro`` to tell.
    """
    command = [sys.executable, "-m", "drank.planning.plan", *targets]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def collect(targets: list[str]) -> list[str]:
    """The same for the project of the working directory, in this process."""
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with Repo() as repo:
        asked = collect_stages(repo, targets or ["dvc.yaml"])
        written: dict[str, Any] = {}  # what stages will have written, by path, as DVC's outs with hashes
        running = []
        for stage in plan_repro(get_active_graph(repo.index.graph), asked):
            if stage.frozen or not stage.cmd:
                continue
            found = _written(repo, stage, written)
            if found is UNKNOWN:
                running.append(stage.addressing)
                found = {out.fs_path: UNKNOWN for out in stage.outs}
            written |= found
    return running


def _written(repo: Any, stage: Any, before: dict[str, Any]) -> dict[str, Any] | None:
    """Outs by path that a stage puts in place without running; UNKNOWN if it runs."""
    from dvc.dependency import ParamsDependency

    changed = stage.changed_stage() or any(out.status() for out in stage.outs)
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency) or not (near := _near(dep.fs_path, before)):
            changed = bool(dep.status()) or changed
        elif near == [dep.fs_path] and before[dep.fs_path] is not UNKNOWN:
            changed = dep.hash_info != before[dep.fs_path].hash_info or changed
        elif not all(before[path] is not UNKNOWN and before[path].as_locked for path in near):
            return UNKNOWN
    return _cached(repo, stage, before) if changed else {}


def _near(path: str, before: dict[str, Any]) -> list[str]:
    """Parts that earlier stages write: the path itself, a folder around it, or what is in it."""
    return [out for out in before if f"{path}/".startswith(f"{out}/") or out.startswith(f"{path}/")]


def _cached(repo: Any, stage: Any, before: dict[str, Any]) -> dict[str, Any] | None:
    """Outs by path that DVC would take from its cache of runs, as ``StageCache.restore`` does; UNKNOWN if none.

    Each has ``as_locked``: whether it is what dvc.lock has, so that files and folders around and in it are, too.
    """
    from dvc.stage.cache import _get_cache_hash
    from dvc.stage.serialize import to_single_stage_lockfile

    if stage.always_changed or not (stage.deps and stage.outs):
        return UNKNOWN
    for dep in stage.deps:
        if dep.fs_path in before:
            dep.hash_info, dep.meta = before[dep.fs_path].hash_info, before[dep.fs_path].meta
        elif _near(dep.fs_path, before):
            continue  # as in dvc.lock
        elif not dep.exists:
            return UNKNOWN
        else:
            dep.save()
    key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
    folder = Path(repo.stage_cache._get_cache_dir(key))
    entries = sorted(folder.glob("*"), key=lambda entry: entry.stat().st_mtime, reverse=True)
    if not entries or not (entry := repo.stage_cache._load_cache(key, entries[0].name)):
        return UNKNOWN
    restored = repo.stage_cache._create_stage(entry, wdir=stage.wdir)
    if not restored.outs_cached():
        return UNKNOWN
    locked = {out.fs_path: out.hash_info for out in stage.outs}
    for out in restored.outs:
        out.as_locked = out.hash_info == locked[out.fs_path]
    return {out.fs_path: out for out in restored.outs}


if __name__ == "__main__":
    try:
        names = collect(sys.argv[1:])
    except (Exception, KeyboardInterrupt):
        raise SystemExit(1) from None
    sys.stdout.write(json.dumps(names))
