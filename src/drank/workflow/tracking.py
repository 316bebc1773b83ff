"""MLflow as a projection of dvc.lock: one run a variant, all of them under one run a state of the lock.

``track`` reads what ``dvc repro`` left and runs nothing, so a variant that DVC restored from its cache is there like
one that was computed. The runs of a state are found by the hash of the lock's stages: the same state makes nothing
the second time, and what a killed call left unfinished is made anew. This is the only module that imports mlflow.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from drank import __version__
from drank.workflow.lock import State, Variant, outs_of, read_md5, read_state, sha256_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

EXPERIMENT = "drank"
PACKAGES = ("dvc", "lm-eval", "mlflow", "numpy", "scipy", "torch", "transformers")


class TrackingError(ValueError):
    """MLflow's store cannot be used."""


@dataclass(frozen=True)
class Tracked:
    """What a call of :func:`track` made and what it found made already, as names of runs."""

    experiment: str
    tracking_uri: str
    created: tuple[str, ...]
    existing: tuple[str, ...]


def track(root: Path) -> Tracked:
    """Log the state of ``root/dvc.lock`` to MLflow, unless it is there.

    The store is ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the folder that DVC names in ``DVC_ROOT`` (an
    experiment in a temporary folder points to its repository there), or else in ``root``.

    Raises:
        LockError: no lock, a variant without results, parameters or files that changed since ``dvc repro``.
        TrackingError: a store that cannot be used.
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
        "dvc.stages_sha256": sha256_of(variant.stages),
        "mlflow.parentRunId": parent,
        "mlflow.note.content": _describe_variant(variant),
        **{f"dvc.out.{path}": md5 for path, md5 in outs_of(variant.stages).items()},
    }
    run_id = client.create_run(experiment_id, tags=tags, run_name=variant.name).info.run_id
    with _finishing(client, run_id):
        params = [Param(key, value) for key, value in variant.params.items()]
        client.log_batch(run_id, metrics=_metrics(variant), params=params)
        client.log_inputs(run_id, datasets=_datasets(state, variant))
        client.log_artifact(run_id, str(state.root / f"data/allocation/{variant.name}.json"), "allocation")
        client.log_table(run_id, pd.DataFrame(variant.allocation["units"]).drop(columns="members"), "units.json")
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

    drawn = f"data/sampling/calibration/{variant.params['spectrum.calibration_seed']}.safetensors"
    used = [("calibration", state.calibration_text, drawn)]
    used += [("evaluation", text, "data/sampling/test.safetensors") for text in state.texts]
    return [
        DatasetInput(
            Dataset(
                name=text,
                digest=read_md5(variant.stages, path).removesuffix(".dir"),
                source_type="local",
                source=json.dumps({"uri": path}),
                profile=json.dumps(state.texts[text], sort_keys=True),
            ),
            [InputTag("mlflow.data.context", context), InputTag("source", variant.params[f"text.{text}.source"])],
        )
        for context, text, path in used
    ]


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
