"""The state of dvc.lock: what was run with which parameters, and whether the files beside it are still those.

Reads DVC's own record and nothing else: no stage runs, and MLflow is not needed. Every path that is returned was
compared with the hash that the lock holds.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from drank.project.documents import AllocationDocument, Results, read_document
from drank.project.dvc import LockError, Stages, dvc_md5, read_lock
from drank.project.files import read_json
from drank.project.params import Params, read_params
from drank.project.plain_yaml import load


@dataclass(frozen=True)
class Variant:
    """A variant as dvc.lock has it: the stages it came through, what they left, and the steps of healing, if any."""

    name: str
    stages: Stages
    params: dict[str, str]
    results: Results
    allocation: AllocationDocument
    loss_curve: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class State:
    """A finished state of the lock, every file of it checked against its hash."""

    root: Path
    sha256: str
    variants: tuple[Variant, ...]


def read_state(root: Path) -> State:
    """Read dvc.lock and the files it speaks of.

    Raises:
        LockError: no lock, a variant without results, parameters or files that changed since ``dvc repro``.
    """
    lock = read_lock(root / "dvc.lock")
    params = read_params(root / "params.yaml")
    for path in ("results/summary.csv", "results/figures", "data/sampling"):
        check_written(root, lock, path)
    return State(root, sha256_of(lock), tuple(_read_variant(root, lock, params, name) for name in params.variants))


def _read_variant(root: Path, lock: Stages, params: Params, name: str) -> Variant:
    def written(path: str) -> Path:
        check_written(root, lock, path)
        return root / path

    results = read_document(written(f"results/{name}.json"), Results)
    allocation = read_document(written(f"data/allocation/{name}.json"), AllocationDocument)
    stages = lineage(lock, _writer(root, lock, f"data/models/{name}"))
    check_order(stages, str(root / "dvc.lock"))
    check_params(stages, load((root / "params.yaml").read_bytes()), str(root / "params.yaml"))
    curve = read_json(written(f"data/evaluation/{name}.json"))["loss_curve"] if params.variants[name].healing else ()
    return Variant(name, stages, flat(params.parameters_of(name)), results, allocation, tuple(curve))


def writers(stages: Stages, path: str) -> list[str]:
    """The stage that has this path or the closest folder around it among its outs or, if none, those with outs inside.

    DVC keeps the rows of stages that dvc.yaml no longer has: such a stage may have written a folder around the path.
    """
    outs = [(PurePosixPath(out["path"]), stage) for stage, row in stages.items() for out in row.get("outs", ())]
    around = [(len(out.parts), stage) for out, stage in outs if PurePosixPath(path).is_relative_to(out)]
    inside = dict.fromkeys(stage for out, stage in outs if out.is_relative_to(path))
    return [max(around)[1]] if around else list(inside)


def _writer(root: Path, lock: Stages, path: str) -> str:
    if found := writers(lock, path):
        return found[0]
    raise LockError(f"{root / 'dvc.lock'}: no stage has written {path} yet; run `dvc repro`")


def lineage(lock: Stages, stage: str) -> Stages:
    """A stage and everything it depends on: what a stage reads comes before it, the stage itself is last."""
    ordered: Stages = {}
    seen = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for dependency in lock[name].get("deps", ()):
                for before in writers(lock, dependency["path"]):
                    visit(before)
            ordered[name] = lock[name]

    visit(stage)
    return ordered


def outs_of(stages: Stages) -> dict[str, str]:
    """DVC's hash of everything that these stages wrote, by path."""
    return {out["path"]: out["md5"] for row in stages.values() for out in row.get("outs", ())}


def check_written(root: Path, lock: Stages, path: str) -> str:
    """The stage that wrote this path, which is as that stage left it; a LockError if it is not, or none wrote it."""
    stage = _writer(root, lock, path)
    if not (root / path).exists():
        raise LockError(f"{root / path}: not found, but {stage} wrote it; run `dvc repro`")
    recorded, found = outs_of(lock).get(path), dvc_md5(root / path)
    if found != recorded:
        told = f"edited or stale: its md5 is {found}, but {stage} wrote {recorded}"
        raise LockError(f"{root / path}: {told}; run `dvc repro`")
    return stage


def check_order(stages: Stages, where: str) -> None:
    """Refuse, with a LockError, a lineage of which only the upper part was reproduced.

    A stage then read another version of a file than the one that is recorded as written, and the parameters are not
    those of the results.
    """
    outs = outs_of(stages)
    for stage, row in stages.items():
        for path, read in ((dependency["path"], dependency["md5"]) for dependency in row.get("deps", ())):
            if (written := outs.get(path, read)) != read:
                told = f"{stage} read a {path} of md5 {read}, but {writers(stages, path)[0]} has written {written}"
                raise LockError(f"{where}: {told} since; run `dvc repro`")


def check_params(stages: Stages, document: Any, where: str, file: str = "params.yaml") -> None:
    """Compare the parameters that stages ran with with those of a params.yaml, given as a document.

    ``where`` names it in the LockError if a value differs, is gone or was added; ``file`` is its path in the lock.
    """
    there = flat(document).items()
    for stage, row in stages.items():
        sections = row.get("params", {}).get(file, {})
        before = flat(sections)
        now = {key: value for key, value in there if any(f"{key}.".startswith(f"{name}.") for name in sections)}
        if differing := before.items() ^ now.items():
            key = min(differing)[0]
            told = f"{key} is {now.get(key, 'missing')}, but {stage} ran with {before.get(key, 'none')}"
            raise LockError(f"{where}: {told}; run `dvc repro`")


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Values of a nested document as text, by dotted key."""
    if isinstance(value, Mapping):
        rows = (flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items())
        return {dotted: text for row in rows for dotted, text in row.items()}
    return {key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


def sha256_of(stages: Stages) -> str:
    return hashlib.sha256(json.dumps(stages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
