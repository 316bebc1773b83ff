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
from drank.project.resolved import resolved


@dataclass(frozen=True)
class Variant:
    """A variant as dvc.lock has it: the stages it came through, and what they left that is worth comparing.

    ``loss_curve`` is that of healing, with ``step``, ``loss`` and ``learning_rate``; empty without it.
    """

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
    check_written(root, lock, "results/summary.csv")
    check_written(root, lock, "results/figures")
    check_written(root, lock, "data/sampling")
    return State(
        root=root,
        sha256=sha256_of(lock),
        variants=tuple(_read_variant(root, lock, params, name) for name in params.variants),
    )


def _read_variant(root: Path, lock: Stages, params: Params, name: str) -> Variant:
    results, allocation = f"results/{name}.json", f"data/allocation/{name}.json"
    for path in (results, allocation):
        check_written(root, lock, path)
    released = writer(lock, f"data/models/{name}")
    if released is None:
        raise LockError(f"{root / 'dvc.lock'}: no stage has written data/models/{name} yet; run `dvc repro`")
    stages = lineage(lock, released)
    check_order(stages, str(root / "dvc.lock"))
    written = root / "params.yaml"
    check_params(stages, load(written.read_text(encoding="utf-8")), str(written))
    curve: tuple[dict[str, Any], ...] = ()
    if params.variants[name].healing:
        check_written(root, lock, f"data/evaluation/{name}.json")
        curve = tuple(read_json(root / f"data/evaluation/{name}.json")["loss_curve"])
    made_of = flat(resolved(params, name))
    figures, ranks = read_document(root / results, Results), read_document(root / allocation, AllocationDocument)
    return Variant(name, stages, made_of, figures, ranks, curve)


def writer(stages: Stages, path: str) -> str | None:
    """The stage that has this path, or the closest folder around it, among its outs.

    The closest, since DVC keeps the rows of stages that dvc.yaml no longer has, and such a one may have written a
    folder around what is now the out of another.
    """
    around = [
        (len(PurePosixPath(out["path"]).parts), stage)
        for stage, row in stages.items()
        for out in row.get("outs", ())
        if PurePosixPath(path).is_relative_to(out["path"])
    ]
    return max(around)[1] if around else None


def lineage(lock: Stages, stage: str) -> Stages:
    """A stage and everything it depends on: what a stage reads comes before it, the stage itself is last."""
    ordered: Stages = {}
    seen = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for dependency in lock[name].get("deps", ()):
                before = writer(lock, dependency["path"])
                if before:
                    visit(before)
            ordered[name] = lock[name]

    visit(stage)
    return ordered


def outs_of(stages: Stages) -> dict[str, str]:
    """DVC's hash of everything that these stages wrote, by path."""
    return {out["path"]: out["md5"] for row in stages.values() for out in row.get("outs", ())}


def check_written(root: Path, lock: Stages, path: str) -> str:
    """The stage that wrote this path, which is as that stage left it.

    Raises:
        LockError: no stage wrote it, or it is gone or another one.
    """
    stage = writer(lock, path)
    if stage is None:
        raise LockError(f"{root / 'dvc.lock'}: no stage has written {path} yet; run `dvc repro`")
    if not (root / path).exists():
        raise LockError(f"{root / path}: not found, but {stage} wrote it; run `dvc repro`")
    recorded, found = outs_of(lock)[path], dvc_md5(root / path)
    if found != recorded:
        raise LockError(
            f"{root / path}: edited or stale: its md5 is {found}, but {stage} wrote {recorded}; run `dvc repro`"
        )
    return stage


def check_order(stages: Stages, where: str) -> None:
    """Refuse a lineage of which only the upper part was reproduced: its parameters are not those of its results.

    Raises:
        LockError: a stage read another version of a file than the one that is recorded as written.
    """
    outs = outs_of(stages)
    for stage, row in stages.items():
        for dependency in row.get("deps", ()):
            path, read = dependency["path"], dependency["md5"]
            if read != outs.get(path, read):
                raise LockError(
                    f"{where}: {stage} read a {path} of md5 {read}, but {writer(stages, path)} has "
                    f"written {outs[path]} since; run `dvc repro`"
                )


def check_params(stages: Stages, document: Any, where: str, file: str = "params.yaml") -> None:
    """Compare the parameters that stages ran with with those of a params.yaml, given as a document.

    ``file`` is its path in the lock.

    Raises:
        LockError: one differs, is gone or was added; ``where`` names the params.yaml.
    """
    now = flat(document)
    for stage, row in stages.items():
        sections = row.get("params", {}).get(file, {})
        before = flat(sections)
        keys = before.keys() | {key for key in now if any(f"{key}.".startswith(f"{name}.") for name in sections)}
        for key in sorted(keys):
            if before.get(key) != now.get(key):
                raise LockError(
                    f"{where}: {key} is {now.get(key, 'missing')}, but {stage} ran with "
                    f"{before.get(key, 'none')}; run `dvc repro`"
                )


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Values of a nested document as text, by dotted key."""
    if isinstance(value, Mapping):
        rows = (flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items())
        return {dotted: text for row in rows for dotted, text in row.items()}
    return {key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


def sha256_of(stages: Stages) -> str:
    return hashlib.sha256(json.dumps(stages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
