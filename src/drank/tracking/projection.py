"""One run per variant, under one run per state of dvc.lock."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from drank import __version__
from drank.project.dvc import LockError, read_lock
from drank.project.files import file_sha256
from drank.project.params import Preset, Spectrum
from drank.project.state import State, Variant, check_written, outs_of, read_md5, read_state, sha256_of
from drank.tracking import view
from drank.tracking.store import EXPERIMENT, Store, link, open_store, where_to_look_for

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Run

PACKAGES = ("dvc", "lm-eval", "mlflow", "numpy", "scipy", "torch", "transformers")
COLUMNS = ("name", "layer", "kind", "form", "rank", "full_rank", "price", "effective_rank", "relative_loss")
METRICS_A_CALL = 1000  # MLflow takes no more; a large model has more matrices
OWN = ("variant.", "preset.", "spectrum.", "healing.")
# Logged of a state beside its variants, and what tells whether it is one.
FIGURES, DOCUMENTS = "results/figures", ("results/summary.csv", "results/report.html", "params.yaml", "dvc.lock")
SHARED = (FIGURES, *DOCUMENTS, "data/sampling")
# Keys that cannot make two variants of one model differ in more than the last bits.
MACHINE = ("covariance.batch_windows", "covariance.threads")


@dataclass(frozen=True)
class Tracked:
    """Runs that a call of :func:`track` made, and those that were there, by name; and the page of them."""

    experiment: str
    tracking_uri: str
    page: str
    created: tuple[str, ...]
    existing: tuple[str, ...]


def track(root: Path) -> Tracked:
    """Log the state of ``root/dvc.lock`` to MLflow, unless it is there.

    The store is ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the folder that DVC names in ``DVC_ROOT`` (an
    experiment in a temporary folder points to its repository there), or else in ``root``. A state that was logged
    before it was committed gets the commit's hash from the first call after the commit.

    Raises:
        LockError: no lock, a variant without results, parameters or files that changed since ``dvc repro``.
        TrackingError: a store that cannot be used.
    """
    state = read_state(root)
    with open_store(root) as store:
        created, existing = project(store, state)
    return Tracked(EXPERIMENT, store.uri, link(store, view.PAGE), tuple(created), tuple(existing))


def where_to_look(tracked: Tracked) -> str:
    """The next thing to type, or the place to go, to see the runs."""
    return where_to_look_for(tracked.tracking_uri, tracked.page)


def project(store: Store, state: State) -> tuple[list[str], list[str]]:
    """Make the runs of a state that are missing; the names of those made, and of those found.

    Raises:
        LockError: the files of the state changed since it was read.
    """
    git = _git(state.root)
    with _held(state) as held:
        return _project(store, held, git)


def _project(store: Store, state: State, git: dict[str, str]) -> tuple[list[str], list[str]]:
    name, tags = f"pipeline-{state.sha256[:8]}", _state_tags(state, git)
    pipeline = _find_pipeline(store, state.sha256)
    existing = [name] if pipeline else []
    finished = variant_runs(store, pipeline.info.run_id) if pipeline else {}
    if pipeline is None:
        pipeline = store.client.create_run(store.experiment_id, tags=tags, run_name=name)
    parent = pipeline.info.run_id
    missing = [variant for variant in state.variants if variant.name not in finished]
    if missing or pipeline.info.status != "FINISHED":
        with _finishing(store, parent):
            _log_state(store, parent, state)
            for variant in missing:
                _log_variant(store, parent, state, variant, _variant_tags(state, variant, git))
    _follow_commit(store, pipeline, tags, git)
    for variant in state.variants:
        if variant.name in finished:
            _follow_commit(store, finished[variant.name], _variant_tags(state, variant, git), git)
    _show(store, state)
    found = existing + [variant.name for variant in state.variants if variant.name in finished]
    return [run for run in [name, *(v.name for v in state.variants)] if run not in found], found


@contextmanager
def _held(state: State) -> Iterator[State]:
    """The state in a copy of its files: a ``dvc repro`` may change those of the workspace before they are logged.

    Raises:
        LockError: they are no longer those of the state.
    """
    names = [variant.name for variant in state.variants]
    paths = [*SHARED, *(f"{folder}/{name}.json" for folder in ("results", "data/allocation") for name in names)]
    paths += [f"data/evaluation/{variant.name}.json" for variant in state.variants if variant.loss_curve]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for path in paths:
                _copy(state.root / path, Path(folder) / path)
            held = read_state(Path(folder))
            check_written(held.root, read_lock(held.root / "dvc.lock"), "results/report.html")
            if held.sha256 != state.sha256:
                raise LockError("dvc.lock is another one")
        except (ValueError, FileNotFoundError, shutil.Error) as error:
            raise LockError(
                f"{state.root}: changed while it was read; is `dvc repro` at work there? `drank track` again when it "
                f"has ended ({str(error).replace(folder, str(state.root))})"
            ) from error
        yield held


def _copy(path: Path, destination: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, destination)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)


def variant_runs(store: Store, parent: str) -> dict[str, "Run"]:
    """The variants that are logged whole, by name; what a killed call left half-made is deleted."""
    finished = {}
    for run in store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        if run.info.status == "FINISHED":
            finished[run.data.tags["drank.variant"]] = run
        else:
            for model in store.client.search_logged_models(
                [store.experiment_id], f"source_run_id = '{run.info.run_id}'"
            ):
                store.client.delete_logged_model(model.model_id)
            store.client.delete_run(run.info.run_id)
    return finished


def find_variant(store: Store, state: State, name: str) -> "Run":
    """The run of a variant of a state that was projected."""
    pipeline = _find_pipeline(store, state.sha256)
    assert pipeline is not None
    return variant_runs(store, pipeline.info.run_id)[name]


def _find_pipeline(store: Store, lock_sha256: str) -> "Run | None":
    query = f"tags.`dvc.lock_sha256` = '{lock_sha256}' and tags.`drank.run` = 'pipeline'"
    return next(iter(store.client.search_runs([store.experiment_id], query, max_results=1)), None)


@contextmanager
def _finishing(store: Store, run_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.client.set_terminated(run_id, "FAILED")
        raise
    store.client.set_terminated(run_id, "FINISHED")


def _follow_commit(store: Store, run: "Run", tags: dict[str, str], git: dict[str, str]) -> None:
    """Results are committed after they were logged: then, and only then, does a run name the commit that has them."""
    if run.data.tags.get("git.dirty") == "true" and git.get("git.dirty") == "false":
        for key, value in tags.items():
            if run.data.tags.get(key) != value:
                store.client.set_tag(run.info.run_id, key, value)


def _show(store: Store, state: State) -> None:
    """Point the experiment's saved views to this state."""
    present = store.client.get_experiment(store.experiment_id).tags
    metrics = sorted({key for variant in state.variants for key in _figures(state, variant)})
    for key, value in view.experiment_tags(state.sha256, metrics, _dense(state) is not None).items():
        if present.get(key) != value:
            store.client.set_experiment_tag(store.experiment_id, key, value)


def _log_state(store: Store, run_id: str, state: State) -> None:
    from mlflow.entities import Param

    shared = {k: v for k, v in state.variants[0].params.items() if not k.startswith(OWN)} if state.variants else {}
    store.client.log_batch(run_id, params=[Param(key, value) for key, value in shared.items()])
    store.client.log_artifacts(run_id, str(state.root / FIGURES), "figures")
    for path in DOCUMENTS:
        store.client.log_artifact(run_id, str(state.root / path))


def _log_variant(store: Store, parent: str, state: State, variant: Variant, tags: dict[str, str]) -> None:
    import pandas as pd
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from mlflow.entities import LoggedModelOutput, Param

    from drank.views.pictures import rank_heat_map

    client, params = store.client, _params(variant) | _used(variant)
    # MLflow's own colours are hashes, some of them alike.
    color = to_hex(colormaps["tab20"](state.variants.index(variant) % 20))
    tags = tags | {"mlflow.parentRunId": parent, "mlflow.runColor": color}
    run_id = client.create_run(store.experiment_id, tags=tags, run_name=variant.name).info.run_id
    with _finishing(store, run_id):
        model_id = _log_model(store, run_id, variant, params, tags)
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        _log_metrics(store, run_id, _metrics(state, variant, model_id))
        client.log_inputs(run_id, datasets=_datasets(state, variant))
        client.log_artifact(run_id, str(state.root / f"data/allocation/{variant.name}.json"), "allocation")
        client.log_artifact(run_id, str(state.root / f"results/{variant.name}.json"), "results")
        units = pd.DataFrame(variant.allocation["units"])
        client.log_table(run_id, units[[name for name in COLUMNS if name in units]], "ranks.json")
        client.log_figure(run_id, rank_heat_map([variant.allocation]), "ranks.png")


def _log_model(store: Store, run_id: str, variant: Variant, params: dict[str, str], tags: dict[str, str]) -> str:
    """A logged model that says where the weights are, and holds none."""
    kept = ("drank.variant", "allocation.sha256", "model.dvc_md5", "dvc.lock_sha256")
    model = store.client.create_logged_model(
        store.experiment_id,
        name=variant.name,
        source_run_id=run_id,
        params=params,
        tags={key: tags[key] for key in kept} | {"mlflow.model.isExternal": "true", "dvc.path": folder_of(variant)},
        model_type="drank",
    )
    return store.client.finalize_logged_model(model.model_id, "READY").model_id


def folder_of(variant: Variant) -> str:
    return f"data/models/{variant.name}"


def _params(variant: Variant) -> dict[str, str]:
    """All that can make two variants differ: the four choices and the size under short names, then by section."""
    absent = {f"preset.{key}": "none" for key in Preset.model_fields}
    absent |= {f"spectrum.{key}": "none" for key in Spectrum.model_fields}
    given = absent | {key: value or "none" for key, value in variant.params.items()}
    short = {
        "preset": given.pop("variant.preset"),
        "size_ratio": given.pop("variant.size_ratio"),
        "spectrum": given.pop("variant.spectrum"),
        "allocation": given.pop("preset.allocation"),
        "storage": given.pop("preset.storage"),
        "healing": given.get("healing.objective", "none"),
        "model": given["model.source"],
    }
    del given["preset.spectrum"]
    sections = ("preset.", "spectrum.", "healing.", "sampling.", "covariance.")
    return short | {key: given[key] for key in given if key.startswith(sections) and key not in MACHINE}


def _used(variant: Variant) -> dict[str, str]:
    """The type that the variant was measured in; params.yaml may leave it to the processor."""
    dtype = variant.results.get("protocol", {}).get("dtype")
    return {"compute.dtype": dtype} if dtype else {}


def _dense(state: State) -> Variant | None:
    return next((variant for variant in state.variants if variant.allocation["allocation"] == "dense"), None)


def _figures(state: State, variant: Variant) -> dict[str, float]:
    """Figures of the results that are worth a column, under their names there, and what follows from them."""
    redundant = ("size_ratio", "targeted_parameters")
    figures = {
        key: value
        for key, value in variant.results.items()
        if isinstance(value, int | float)
        and key not in redundant
        and not key.partition("/")[0].endswith(("_stderr", "word_perplexity"))
    }
    dense = _dense(state)
    if dense:
        perplexities = [key for key in figures if key.startswith("token_perplexity/")]
        figures |= {
            f"ppl_over_dense/{key.partition('/')[2]}": figures[key] / dense.results[key] for key in perplexities
        }
    return figures | {"allocation/gap": variant.allocation["objective"]["gap"]}


def _metrics(state: State, variant: Variant, model_id: str) -> list["Metric"]:
    """The figures, which are the logged model's too, the rank of every kind of matrix over the layers, and the loss
    over the steps of healing."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    figures = [Metric(k, v, now, step=0, model_id=model_id) for k, v in _figures(state, variant).items()]
    units = variant.allocation["units"]
    ranks = [Metric(f"rank/{unit['kind']}", unit["rank"], now, step=unit["layer"]) for unit in units]
    return (
        figures
        + ranks
        + [
            Metric(f"healing/{key}", row[key], now, step=int(row["step"]))
            for row in variant.loss_curve
            for key in ("loss", "learning_rate")
        ]
    )


def _log_metrics(store: Store, run_id: str, metrics: list["Metric"]) -> None:
    for start in range(0, len(metrics), METRICS_A_CALL):
        store.client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_CALL])


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


def _state_tags(state: State, git: dict[str, str]) -> dict[str, str]:
    lines = [f"* {variant.name}: kept {variant.results['kept_ratio']:.4f}" for variant in state.variants]
    note = "\n".join(["Everything that one state of `dvc.lock` holds, a run per variant:", "", *lines, "", _links(git)])
    return {
        "drank.run": "pipeline",
        "drank.version": __version__,
        "dvc.lock_sha256": state.sha256,
        "mlflow.source.name": "dvc repro",
        "mlflow.note.content": note,
        **{f"version.{package}": version(package) for package in PACKAGES},
        **git,
    }


def _variant_tags(state: State, variant: Variant, git: dict[str, str]) -> dict[str, str]:
    """The way to the variant, by hash: commit, lock, allocation, model folder, and every out on the way."""
    allocation, outs = f"data/allocation/{variant.name}.json", outs_of(variant.stages)
    identity = {
        "drank.run": "variant",
        "drank.variant": variant.name,
        "dvc.lock_sha256": state.sha256,
        "dvc.stages_sha256": sha256_of(variant.stages),
        "allocation.sha256": file_sha256(state.root / allocation),
        "model.dvc_md5": outs[folder_of(variant)],
    }
    return {
        **identity,
        **git,
        **{f"dvc.out.{path}": md5 for path, md5 in outs.items()},
        "drank.version": __version__,
        "mlflow.source.name": f"dvc repro {_last_stage(variant)}",
        "mlflow.note.content": _describe(variant, identity, git),
    }


def _last_stage(variant: Variant) -> str:
    return f"release@{variant.name}"


def _describe(variant: Variant, identity: dict[str, str], git: dict[str, str]) -> str:
    results, allocation = variant.results, variant.allocation
    return (
        f"Preset **{allocation['preset']}** (allocation `{allocation['allocation']}`, storage "
        f"`{allocation['storage']}`, factors `{allocation['spectrum']}`), {allocation['size_ratio']} of the targeted "
        f"parameters asked, {results['kept_ratio']:.4f} kept: {results['parameters']:,} parameters, "
        f"{results['bytes'] / 1e6:.1f} MB. Rebuild with `dvc repro {_last_stage(variant)}`, verify with "
        f"`drank audit {folder_of(variant)}`. {_links(git)}\n\n"
        f"* allocation `data/allocation/{variant.name}.json`: sha256 `{identity['allocation.sha256']}`\n"
        f"* model `{folder_of(variant)}`: md5 in dvc.lock `{identity['model.dvc_md5']}`\n"
        f"* stages of `dvc.lock`: sha256 `{identity['dvc.lock_sha256']}`\n"
    )


def _links(git: dict[str, str]) -> str:
    if "git.commit" not in git:
        return "Made outside git."
    changed = ", changed and not committed since" if git["git.dirty"] == "true" else ""
    return f"Commit `{git['git.commit']}`{changed}."


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
    if head.returncode != 0:
        return tags
    commit = head.stdout.strip()
    return tags | {"git.commit": commit, "mlflow.source.git.commit": commit}
