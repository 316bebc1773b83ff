"""Which variant is champion: versions of a registered model, and the way from a model folder back to its runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from drank.project.dvc import dvc_md5
from drank.project.files import file_sha256
from drank.project.state import State, outs_of
from drank.tracking.projection import folder_of, project
from drank.tracking.store import EXPERIMENT, Store, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

MODEL = "drank"
CHAMPION = "champion"
CARRIED = ("drank.variant", "allocation.sha256", "model.dvc_md5", "dvc.lock_sha256", "git.commit", "git.dirty")
DESCRIPTION = (
    "Variants that were promoted, a version per model folder. Versions hold no weights: their `MLmodel` points to the "
    "folder, tag `dvc.path` is its name in DVC, `model.dvc_md5` its hash there, `allocation.sha256` what allocation "
    "made it, `git.commit` where its `dvc.lock` is."
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


def prepare(store: Store, state: State, name: str, root: Path, git: Mapping[str, str]) -> Promotion:
    """Track the state and register a variant of it, so that only the alias has to move.

    The source of a version is what its run logged, and its tags tell the folder, which DVC keeps, by hash. The same
    folder is the same version, from whichever state of the lock it is promoted.

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
        versions[md5] = _register(store, run, root / folder, folder)
    return Promotion(_variant_run(store, run, versions[md5]), md5, is_new)


def set_champion(store: Store, promotion: Promotion) -> None:
    """Move the alias ``champion`` to the version of a variant, unless it is there."""
    if not promotion.run.champion:
        store.client.set_registered_model_alias(MODEL, CHAMPION, str(promotion.run.version))


def find_runs(root: Path, model_md5: str) -> list[VariantRun]:
    """The runs that logged a model folder, newest first, by DVC's hash of it (with its ``.dir``, as in dvc.lock).

    Raises:
        TrackingError: no store, none with an experiment of ours, or one that cannot be used; nothing is created.
    """
    query = f"tags.`drank.run` = 'variant' and tags.`model.dvc_md5` = '{model_md5}'"
    with open_store(root, create=False) as store:
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


def _register(store: Store, run: "Run", folder: Path, path: str) -> "ModelVersion":
    if (folder / "MLmodel").is_file():  # which older releases have not
        store.client.log_dict(run.info.run_id, _pointing_to(folder), "MLmodel")
    if not store.client.search_registered_models(f"name = '{MODEL}'"):
        store.client.create_registered_model(MODEL, description=DESCRIPTION)
    return store.client.create_model_version(
        MODEL,
        source=run.info.artifact_uri,
        run_id=run.info.run_id,
        tags={key: run.data.tags[key] for key in CARRIED if key in run.data.tags} | {"dvc.path": path},
        description=run.data.tags["mlflow.note.content"],
    )


def _pointing_to(folder: Path) -> dict[str, Any]:
    """The folder's MLmodel for a place outside it: MLflow writes beside what it loads, and servers take no such paths.

    The path will hold other weights one day, which the loader tells by the hash of SHA256SUMS.
    """
    document: dict[str, Any] = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    flavor = document["flavors"]["python_function"]
    flavor |= {"data": str(folder.resolve()), "config": {"released": file_sha256(folder / "SHA256SUMS")}}
    return document
