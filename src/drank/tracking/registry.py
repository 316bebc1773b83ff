"""Which variant is champion: versions of a registered model, and the way from a model folder back to its runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drank.project.dvc import dvc_md5
from drank.project.params import read_params
from drank.project.state import State, outs_of
from drank.tracking.projection import find_variant, folder_of, project
from drank.tracking.store import EXPERIMENT, Store, existing_store, link, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

MODEL = "drank"
CHAMPION = "champion"
CARRIED = ("drank.variant", "allocation.sha256", "model.dvc_md5", "dvc.lock_sha256", "git.commit", "git.dirty")


class PromotionError(ValueError):
    """A variant that cannot be made champion as it is."""


@dataclass(frozen=True)
class Promotion:
    """A variant that is champion now, the version of the registered model that it is, and what tells it by hash."""

    variant: str
    version: int
    is_new: bool
    link: str
    allocation_sha256: str
    model_md5: str
    tracking_uri: str


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


def promote(state: State, name: str) -> Promotion:
    """Make a variant the champion: track the state, register the variant once, move the alias ``champion`` to it.

    A version has no files: its source is the run's logged model, and its tags tell the folder, which DVC keeps, by
    hash. The same folder is the same version, from whichever state of the lock it is promoted.

    Raises:
        ParamsError: params.yaml has no such variant.
        PromotionError: the model folder is not there, or not as the lock has it.
        TrackingError: a store that cannot be used.
    """
    read_params(state.root / "params.yaml").variant(name)
    variant = next(variant for variant in state.variants if variant.name == name)
    folder = folder_of(variant)
    md5 = outs_of(variant.stages)[folder]
    _check_folder(state.root, folder, md5)
    with open_store(state.root) as store:
        project(store, state)
        run = find_variant(store, state, name)
        version = _versions(store).get(md5)
        is_new = version is None
        if version is None:
            version = _register(store, run, folder)
        store.client.set_registered_model_alias(MODEL, CHAMPION, version.version)
    return Promotion(
        variant=name,
        version=int(version.version),
        is_new=is_new,
        link=link(store, f"runs/{run.info.run_id}"),
        allocation_sha256=run.data.tags["allocation.sha256"],
        model_md5=md5,
        tracking_uri=store.uri,
    )


def find_runs(root: Path, model_md5: str) -> list[VariantRun] | None:
    """The runs that logged a model folder, newest first, by DVC's hash of it (with its ``.dir``, as in dvc.lock).

    None where there is no store, or no experiment of ours in it: nothing is created.

    Raises:
        TrackingError: a store that cannot be used.
    """
    store = existing_store(root)
    if store is None:
        return None
    query = f"tags.`drank.run` = 'variant' and tags.`model.dvc_md5` = '{model_md5}'"
    version = _versions(store).get(model_md5)
    registered = store.client.search_registered_models(f"name = '{MODEL}'")
    champion = registered[0].aliases.get(CHAMPION) if registered else None
    return [
        VariantRun(
            run_id=run.info.run_id,
            name=run.data.tags["drank.variant"],
            experiment=EXPERIMENT,
            link=link(store, f"runs/{run.info.run_id}"),
            allocation_sha256=run.data.tags["allocation.sha256"],
            version=None if version is None else int(version.version),
            champion=version is not None and str(version.version) == str(champion),
        )
        for run in store.client.search_runs([store.experiment_id], query)
    ]


def _check_folder(root: Path, folder: str, md5: str) -> None:
    if not (root / folder).is_dir():
        raise PromotionError(f"{root / folder}: not found; fetch it with `dvc checkout`, `dvc pull` or `dvc repro`")
    if (found := dvc_md5(root / folder)) != md5:
        raise PromotionError(
            f"{root / folder}: edited or stale: its md5 is {found}, but dvc.lock has {md5}; run `dvc checkout {folder}`"
        )


def _versions(store: Store) -> dict[str, "ModelVersion"]:
    """The registered model's versions, by DVC's hash of the folder."""
    found = store.client.search_model_versions(f"name = '{MODEL}'")
    return {version.tags["model.dvc_md5"]: version for version in found if "model.dvc_md5" in version.tags}


def _register(store: Store, run: "Run", folder: str) -> "ModelVersion":
    if not store.client.search_registered_models(f"name = '{MODEL}'"):
        store.client.create_registered_model(MODEL, description=DESCRIPTION)
    (model,) = run.outputs.model_outputs
    tags = {key: run.data.tags[key] for key in CARRIED if key in run.data.tags}
    with _as_default(store):
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


@contextmanager
def _as_default(store: Store) -> Iterator[None]:
    """MLflow 3.17 looks a version's logged model up in the default store, whichever store the client has."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = store.uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


DESCRIPTION = (
    "Variants that were promoted, a version a model folder. Versions hold no files: tag `dvc.path` is the folder in "
    "DVC's cache, `model.dvc_md5` its hash there, `allocation.sha256` what allocation made it, `git.commit` where its "
    "`dvc.lock` is."
)
