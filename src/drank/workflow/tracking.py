"""MLflow as a projection of dvc.lock: one run a variant, all of them under one run a state of the lock.

``track`` reads what ``dvc repro`` left and runs nothing, so a variant that DVC restored from its cache is there like
one that was computed. The runs of a state are found by the hash of the lock's stages: the same state makes nothing
the second time, and what a killed call left unfinished is made anew. This is the only module that imports mlflow.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from filelock import FileLock

from drank import __version__
from drank.workflow.files import read_json
from drank.workflow.params import Params, read_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

EXPERIMENT = "drank"
PACKAGES = ("dvc", "lm-eval", "mlflow", "numpy", "scipy", "torch", "transformers")

Stages = dict[str, dict[str, Any]]


class TrackingError(ValueError):
    """dvc.lock, params.yaml and the files they speak of are not one finished state, or MLflow's store is unusable."""


@dataclass(frozen=True)
class Tracked:
    """What a call of :func:`track` made and what it found made already, as names of runs."""

    experiment: str
    tracking_uri: str
    created: tuple[str, ...]
    existing: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A variant as dvc.lock has it: the stages it came through, and what they left that is worth comparing."""

    name: str
    stages: Stages
    params: dict[str, str]
    results: dict[str, Any]
    allocation: dict[str, Any]


@dataclass(frozen=True)
class State:
    """A finished state of the lock, every file of it checked against its hash."""

    root: Path
    sha256: str
    variants: tuple[Variant, ...]
    texts: dict[str, dict[str, Any]]
    calibration_text: str


def track(root: Path) -> Tracked:
    """Log the state of ``root/dvc.lock`` to MLflow, unless it is there.

    The store is ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the folder that DVC names in ``DVC_ROOT`` (an
    experiment in a temporary folder points to its repository there), or else in ``root``.

    Raises:
        TrackingError: no lock, a variant without results, parameters or files that changed since ``dvc repro``,
            or a store that cannot be used.
    """
    state = read_state(root)
    home = Path(os.environ.get("DVC_ROOT") or root).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / 'mlflow.db').as_posix()}"
    guard = home / ".dvc/tmp/drank-track.lock"
    guard.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create one SQLite store break it, and two that look for a run would both make it.
    with FileLock(guard):
        client, experiment_id = _open(uri)
        created, existing = _project(client, experiment_id, state)
    return Tracked(EXPERIMENT, uri, tuple(created), tuple(existing))


def where_to_look(tracked: Tracked) -> str:
    """The next thing to type, or the place to go, to see the runs."""
    if tracked.tracking_uri.startswith("sqlite:"):
        store = shlex.quote(tracked.tracking_uri)
        return f"mlflow ui --backend-store-uri {store}\nthen http://127.0.0.1:5000, experiment {tracked.experiment}"
    return f"experiment {tracked.experiment} on the server that MLFLOW_TRACKING_URI names"


# The state of the lock


def read_state(root: Path) -> State:
    """Read dvc.lock and the files it speaks of.

    Raises:
        TrackingError: as :func:`track`, but for the store.
    """
    lock = _read_lock(root / "dvc.lock")
    params = read_params(root / "params.yaml")
    _check_written(root, lock, "results/summary.csv")
    _check_written(root, lock, "results/figures")
    _check_written(root, lock, "data/sampling")
    return State(
        root=root,
        sha256=_sha256(lock),
        variants=tuple(_read_variant(root, lock, params, name) for name in params.variants),
        texts=read_json(root / "data/sampling/summary.json")["texts"],
        calibration_text=params.sampling.calibration_text,
    )


def _read_lock(path: Path) -> Stages:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrackingError(f"{path}: not found; run `dvc repro`, which writes it") from None
    except yaml.YAMLError as error:
        raise TrackingError(f"{path}: not YAML: {error}; a merge conflict? `dvc repro` writes it anew") from None
    if not isinstance(document, dict) or not document.get("stages"):
        raise TrackingError(f"{path}: holds no stages; run `dvc repro`")
    return document["stages"]


def _read_variant(root: Path, lock: Stages, params: Params, name: str) -> Variant:
    results, allocation = f"results/{name}.json", f"data/allocation/{name}.json"
    stages = _lineage(lock, _check_written(root, lock, results))
    _check_written(root, lock, allocation)
    _check_order(root, stages)
    _check_params(root, stages)
    return Variant(name, stages, _resolved(params, name), read_json(root / results), read_json(root / allocation))


def _writer(stages: Stages, path: str) -> str | None:
    """The stage that has this path, or a folder around it, among its outs."""
    for stage, row in stages.items():
        if any(PurePosixPath(path).is_relative_to(out["path"]) for out in row.get("outs", ())):
            return stage
    return None


def _lineage(lock: Stages, stage: str) -> Stages:
    """A stage and everything it depends on, in the lock's order."""
    names, waiting = set(), [stage]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            writers = (_writer(lock, dependency["path"]) for dependency in lock[name].get("deps", ()))
            waiting += [writer for writer in writers if writer]
    return {name: row for name, row in lock.items() if name in names}


def _outs(stages: Stages) -> dict[str, str]:
    return {out["path"]: out["md5"] for row in stages.values() for out in row.get("outs", ())}


def _check_written(root: Path, lock: Stages, path: str) -> str:
    """The stage that wrote this path, which is as that stage left it."""
    stage = _writer(lock, path)
    if stage is None:
        raise TrackingError(f"{root / 'dvc.lock'}: no stage has written {path} yet; run `dvc repro`")
    if not (root / path).exists():
        raise TrackingError(f"{root / path}: not found, but {stage} wrote it; run `dvc repro`")
    recorded, found = _outs(lock)[path], _dvc_md5(root / path)
    if found != recorded:
        raise TrackingError(
            f"{root / path}: edited or stale: its md5 is {found}, but {stage} wrote {recorded}; run `dvc repro`"
        )
    return stage


def _check_order(root: Path, stages: Stages) -> None:
    """Refuse a lineage of which only the upper part was reproduced: its parameters are not those of its results."""
    outs = _outs(stages)
    for stage, row in stages.items():
        for dependency in row.get("deps", ()):
            path, read = dependency["path"], dependency["md5"]
            if read != outs.get(path, read):
                raise TrackingError(
                    f"{root / 'dvc.lock'}: {stage} read a {path} of md5 {read}, but {_writer(stages, path)} has "
                    f"written {outs[path]} since; run `dvc repro`"
                )


def _check_params(root: Path, stages: Stages) -> None:
    path = root / "params.yaml"
    now = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    for stage, row in stages.items():
        sections = row.get("params", {}).get("params.yaml", {})
        before = _flat(sections)
        keys = before.keys() | {key for key in now if any(f"{key}.".startswith(f"{name}.") for name in sections)}
        for key in sorted(keys):
            if before.get(key) != now.get(key):
                raise TrackingError(
                    f"{path}: {key} is {now.get(key, 'missing')}, but {stage} ran with "
                    f"{before.get(key, 'none')}; run `dvc repro`"
                )


def _resolved(params: Params, name: str) -> dict[str, str]:
    """Everything that makes the variant, under keys that do not depend on its name, so that runs line up."""
    variant, preset = params.variant(name)
    sections = {
        "variant": variant,
        "preset": preset,
        "spectrum": params.spectrum[variant.spectrum],
        "covariance": params.covariance,
        "sampling": params.sampling,
        "evaluation": params.evaluation,
        "model": params.model,
        **{f"text.{text}": source for text, source in params.text.items()},
    }
    return _flat({key: section.model_dump(exclude_none=True) for key, section in sections.items()})


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Values of a nested document as text, by dotted key.

    As text, because YAML 1.1 and 1.2, of which DVC writes one and we read the other, disagree on whether 1e-05 is a
    number.
    """
    if isinstance(value, Mapping):
        rows = (_flat(item, f"{key}.{name}" if key else str(name)) for name, item in value.items())
        return {dotted: text for row in rows for dotted, text in row.items()}
    return {key: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


def _sha256(stages: Stages) -> str:
    return hashlib.sha256(json.dumps(stages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _dvc_md5(path: Path) -> str:
    """The hash that DVC writes in its lock: of a file's bytes, or of a folder's list of hashes and paths."""
    if not path.is_dir():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    rows = [{"md5": _dvc_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    return hashlib.md5(json.dumps(rows).encode(), usedforsecurity=False).hexdigest() + ".dir"


# MLflow


def _open(uri: str) -> tuple["MlflowClient", str]:
    """A client of the store, and our experiment in it; both are created where they are missing."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        # A client of our own, never mlflow.start_run: that one re-opens the run of `mlflow run` (MLFLOW_RUN_ID).
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return client, client.create_experiment(EXPERIMENT, artifact_location=_artifact_location(uri))
    except MlflowException as error:
        raise TrackingError(f"MLflow's store cannot be used; is MLFLOW_TRACKING_URI right? {error}") from error
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow's experiment '{EXPERIMENT}' is deleted; bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return client, experiment.experiment_id


def _artifact_location(uri: str) -> str | None:
    """Beside the SQLite file, or what the server decides: MLflow's own default is the current folder, for ever."""
    address = urlsplit(uri)
    if address.scheme != "sqlite":
        return None
    return (Path(address.path.removeprefix("/")).resolve().parent / "mlartifacts").as_uri()


def _project(client: "MlflowClient", experiment_id: str, state: State) -> tuple[list[str], list[str]]:
    """Make the runs of a state that are missing; the names of those made, and of those found."""
    name = f"pipeline-{state.sha256[:8]}"
    common = {"dvc.lock_sha256": state.sha256, "drank.version": __version__, **_versions(), **_git(state.root)}
    pipeline = _find_pipeline(client, experiment_id, state.sha256)
    existing = [name] if pipeline else []
    if pipeline is None:
        tags = common | {"drank.run": "pipeline", "mlflow.note.content": _describe_state(state)}
        pipeline = client.create_run(experiment_id, tags=tags, run_name=name)
    parent = pipeline.info.run_id
    finished = _finished_variants(client, experiment_id, parent)
    missing = [variant for variant in state.variants if variant.name not in finished]
    if missing or pipeline.info.status != "FINISHED":
        with _finishing(client, parent):
            _log_state(client, parent, state.root)
            for variant in missing:
                _log_variant(client, experiment_id, parent, common, state, variant)
    found = existing + [variant.name for variant in state.variants if variant.name in finished]
    return [run for run in [name, *(v.name for v in state.variants)] if run not in found], found


def _find_pipeline(client: "MlflowClient", experiment_id: str, lock_sha256: str) -> "Run | None":
    query = f"tags.`dvc.lock_sha256` = '{lock_sha256}' and tags.`drank.run` = 'pipeline'"
    return next(iter(client.search_runs([experiment_id], query, max_results=1)), None)


def _finished_variants(client: "MlflowClient", experiment_id: str, parent: str) -> set[str]:
    """Names of the variants that are logged whole; runs that a killed call left half-made are deleted."""
    finished = set()
    for run in client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        if run.info.status == "FINISHED":
            finished.add(run.data.tags["drank.variant"])
        else:
            client.delete_run(run.info.run_id)
    return finished


@contextmanager
def _finishing(client: "MlflowClient", run_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def _log_state(client: "MlflowClient", run_id: str, root: Path) -> None:
    client.log_artifacts(run_id, str(root / "results/figures"), "figures")
    for path in ("results/summary.csv", "params.yaml", "dvc.lock"):
        client.log_artifact(run_id, str(root / path))


def _log_variant(
    client: "MlflowClient", experiment_id: str, parent: str, common: dict[str, str], state: State, variant: Variant
) -> None:
    import pandas as pd
    from mlflow.entities import Param

    from drank.report import rank_heat_map

    tags = common | {
        "drank.run": "variant",
        "drank.variant": variant.name,
        "drank.preset": variant.allocation["preset"],
        "dvc.stages_sha256": _sha256(variant.stages),
        "mlflow.parentRunId": parent,
        "mlflow.note.content": _describe_variant(variant),
        **{f"dvc.out.{path}": md5 for path, md5 in _outs(variant.stages).items()},
    }
    run_id = client.create_run(experiment_id, tags=tags, run_name=variant.name).info.run_id
    with _finishing(client, run_id):
        params = [Param(key, value) for key, value in variant.params.items()]
        client.log_batch(run_id, metrics=_metrics(variant), params=params)
        client.log_inputs(run_id, datasets=_datasets(state, variant))
        client.log_artifact(run_id, str(state.root / f"data/allocation/{variant.name}.json"), "allocation")
        client.log_table(run_id, pd.DataFrame(variant.allocation["units"]), "units.json")
        client.log_figure(run_id, rank_heat_map([variant.allocation]), "ranks.png")


def _metrics(variant: Variant) -> list["Metric"]:
    """Figures of the results, totals of the allocation, and the profile of every kind of matrix over the layers."""
    from mlflow.entities import Metric

    allocation, now = variant.allocation, int(time.time() * 1000)
    objective = allocation["objective"]
    figures = {key: value for key, value in variant.results.items() if isinstance(value, int | float)}
    figures |= {f"allocation/{key}": allocation[key] for key in ("budget", "price", "slack")}
    figures |= {f"allocation/{key}": objective[key] for key in ("bound", "gap")}
    figures["allocation/objective"] = objective["value"]
    profile = [
        Metric(f"{field}/{unit['kind']}", unit[field], now, step=unit["layer"])
        for unit in allocation["units"]
        for field in ("rank", "effective_rank", "relative_loss")
    ]
    return [Metric(key, value, now, step=0) for key, value in figures.items()] + profile


def _datasets(state: State, variant: Variant) -> list["DatasetInput"]:
    """The calibration text and every test text; their content is told by DVC's hash of the windows drawn from them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    used = [("calibration", state.calibration_text, "data/sampling/calibration.safetensors")]
    used += [("evaluation", text, "data/sampling/test.safetensors") for text in state.texts]
    return [
        DatasetInput(
            Dataset(
                name=text,
                digest=_read_md5(variant.stages, path).removesuffix(".dir"),
                source_type="local",
                source=json.dumps({"uri": path}),
                profile=json.dumps(state.texts[text], sort_keys=True),
            ),
            [InputTag("mlflow.data.context", context), InputTag("source", variant.params[f"text.{text}.source"])],
        )
        for context, text, path in used
    ]


def _read_md5(stages: Stages, path: str) -> str:
    """DVC's hash of a path as a stage read it, or of the closest folder around it."""
    read = {dependency["path"]: dependency["md5"] for row in stages.values() for dependency in row.get("deps", ())}
    for candidate in (PurePosixPath(path), *PurePosixPath(path).parents):
        if candidate.as_posix() in read:
            return read[candidate.as_posix()]
    raise TrackingError(f"dvc.lock: no stage of {', '.join(stages)} reads {path}; has dvc.yaml changed?")


def _describe_state(state: State) -> str:
    lines = [f"* {variant.name}: kept {variant.results['kept_ratio']:.4f}" for variant in state.variants]
    return "\n".join(["Everything that one state of `dvc.lock` holds, a run a variant:", "", *lines])


def _describe_variant(variant: Variant) -> str:
    results, allocation = variant.results, variant.allocation
    return (
        f"Preset **{allocation['preset']}** (allocation `{allocation['allocation']}`, storage "
        f"`{allocation['storage']}`, factors `{allocation['spectrum']}`), {allocation['size_ratio']} of the targeted "
        f"parameters asked, {results['kept_ratio']:.4f} kept: {results['parameters']:,} parameters, "
        f"{results['bytes'] / 1e6:.1f} MB.\n\nRank profile: the metrics `rank/...`, whose step is the layer. "
        f"Rebuild with `dvc repro {next(reversed(variant.stages))}`."
    )


def _versions() -> dict[str, str]:
    return {f"version.{package}": version(package) for package in PACKAGES}


def _git(root: Path) -> dict[str, str]:
    """Commit and whether the tree differs from it; nothing outside git, no commit before the first one."""
    if shutil.which("git") is None:
        return {}
    status, head = (
        subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        for arguments in (["status", "--porcelain"], ["rev-parse", "--verify", "--quiet", "HEAD"])
    )
    if status.returncode != 0:
        return {}
    tags = {"git.dirty": "true" if status.stdout.strip() else "false"}
    return tags | ({"git.commit": head.stdout.strip()} if head.returncode == 0 else {})
