"""Which variant is champion: versions of a registered model, and the way from a model folder back to its runs."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from drank.project.dvc import dvc_md5
from drank.project.state import State, outs_of
from drank.tracking.projection import folder_of, project
from drank.tracking.store import EXPERIMENT, Store, existing_store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

MODEL = "drank"
CHAMPION = "champion"
CARRIED = ("drank.variant", "allocation.sha256", "model.dvc_md5", "dvc.lock_sha256", "git.commit", "git.dirty")
DESCRIPTION = (
    "Variants that were promoted, a version per model folder. Versions hold no files: tag `dvc.path` is the folder in "
    "DVC's cache, `model.dvc_md5` its hash there, `allocation.sha256` what allocation made it, `git.commit` where its "
    "`dvc.lock` is."
)


class PromotionError(ValueError):
    """A variant that cannot be made champion as it is."""


@dataclass(frozen=True)
class VariantRun:
    """A run that logged a model folder; ``version`` and ``champion`` are those of the folder in the registry."""

    run_id: str
    name: str
    experiment: str
    link: str
    allocation_sha256: str
    version: int | None
    champion: bool


@dataclass(frozen=True)
class Promotion:
    """A variant that can be made champion: a run of it, DVC's hash of its folder, and whether its version is new."""

    run: VariantRun
    model_md5: str
    is_new: bool


def prepare(store: Store, state: State, name: str, root: Path, git: dict[str, str]) -> Promotion:
    """Track the state and register a variant of it, so that only the alias has to move.

    A version has no files: its source is the run's logged model, and its tags tell the folder, which DVC keeps, by
    hash. The same folder is the same version, from whichever state of the lock it is promoted.

    Raises:
        PromotionError: the model folder is not there, or not as the lock has it.
    """
    variant = next(variant for variant in state.variants if variant.name == name)
    folder = folder_of(variant)
    md5 = outs_of(variant.stages)[folder]
    if not (root / folder).is_dir():
        raise PromotionError(f"{root / folder}: not found; fetch it with `dvc checkout`, `dvc pull` or `dvc repro`")
    if (found := dvc_md5(root / folder)) != md5:
        raise PromotionError(
            f"{root / folder}: edited or stale: its md5 is {found}, but dvc.lock has {md5}; run `dvc checkout {folder}`"
        )
    run, versions = project(store, state, git).runs[name], _versions(store)
    if is_new := md5 not in versions:
        versions[md5] = _register(store, run, folder)
    return Promotion(_variant_run(store, run, versions[md5]), md5, is_new)


def set_champion(store: Store, promotion: Promotion) -> None:
    """Move the alias ``champion`` to the version of a variant, unless it is there."""
    from mlflow.exceptions import MlflowException

    if promotion.run.champion:
        return
    try:
        store.client.set_registered_model_alias(MODEL, CHAMPION, str(promotion.run.version))
    except MlflowException:
        # A server that moved it may have failed to say so.
        with suppress(MlflowException):
            if int(store.client.get_model_version_by_alias(MODEL, CHAMPION).version) == promotion.run.version:
                return
        raise


def find_runs(root: Path, model_md5: str) -> list[VariantRun] | None:
    """The runs that logged a model folder, newest first, by DVC's hash of it (with its ``.dir``, as in dvc.lock).

    None where there is no store, or no experiment of ours in it: nothing is created.

    Raises:
        TrackingError: a store that cannot be used.
    """
    with existing_store(root) as store:
        return None if store is None else _runs_of(store, model_md5)


def log_speed(
    root: Path, model_md5: str, figures: Mapping[str, float], conditions: Mapping[str, Any]
) -> VariantRun | None:
    """Add metrics to the newest run that logged a model folder; the run, or None where there is none.

    No run is created: `drank track` makes them. Every call adds a value to a metric's history, and MLflow shows the
    newest. The tag ``speed.conditions`` has, as JSON, the conditions that figures depend on beside the model.

    Args:
        model_md5: DVC's hash of the folder, with its ``.dir``.
        figures: by name of the metric, such as ``speed/decode``.
        conditions: the machine and the protocol.

    Raises:
        TrackingError: a store that cannot be used.
    """
    with existing_store(root) as store:
        if store is None or not (runs := _runs_of(store, model_md5)):
            return None
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(figure, value, now, 0) for figure, value in figures.items()]
        store.client.log_batch(runs[0].run_id, metrics=metrics)
        store.client.set_tag(runs[0].run_id, "speed.conditions", json.dumps(conditions, sort_keys=True))
        return runs[0]


def _runs_of(store: Store, model_md5: str) -> list[VariantRun]:
    query = f"tags.`drank.run` = 'variant' and tags.`model.dvc_md5` = '{model_md5}'"
    version = _versions(store).get(model_md5)
    return [_variant_run(store, run, version) for run in store.client.search_runs([store.experiment_id], query)]


def _variant_run(store: Store, run: "Run", version: "ModelVersion | None") -> VariantRun:
    registered = store.client.search_registered_models(f"name = '{MODEL}'") if version else []
    return VariantRun(
        run_id=run.info.run_id,
        name=run.data.tags["drank.variant"],
        experiment=EXPERIMENT,
        link=store.link(f"runs/{run.info.run_id}"),
        allocation_sha256=run.data.tags["allocation.sha256"],
        version=int(version.version) if version else None,
        champion=version is not None and registered[0].aliases.get(CHAMPION) in (version.version, str(version.version)),
    )


def _versions(store: Store) -> dict[str, "ModelVersion"]:
    """The registered model's versions, by DVC's hash of the folder."""
    found = store.client.search_model_versions(f"name = '{MODEL}'")
    return {version.tags["model.dvc_md5"]: version for version in found if "model.dvc_md5" in version.tags}


def _register(store: Store, run: "Run", folder: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    (model,) = run.outputs.model_outputs
    try:
        store.client.get_logged_model(model.model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise PromotionError(
            f"MLflow's logged model of {run.info.run_name} was deleted: delete its run too, which is made again, by "
            f"`mlflow runs delete --run-id {run.info.run_id}`, then promote again"
        ) from None
    if not store.client.search_registered_models(f"name = '{MODEL}'"):
        store.client.create_registered_model(MODEL, description=DESCRIPTION)
    tags = {key: run.data.tags[key] for key in CARRIED if key in run.data.tags}
    # MLflow 3.17 looks a version's logged model up in the default store, whichever store the client has.
    with patch.dict(os.environ, MLFLOW_TRACKING_URI=store.uri):
        version = store.client.create_model_version(
            MODEL,
            source=f"models:/{model.model_id}",
            run_id=run.info.run_id,
            model_id=model.model_id,
            tags=tags | {"dvc.path": folder},
            description=run.data.tags["mlflow.note.content"],
        )
    versions = [{"name": MODEL, "version": version.version}]
    store.client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps(versions)})
    return version
