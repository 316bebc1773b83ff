"""One run per variant, under one run per state of dvc.lock."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from drank import __version__
from drank.project.dvc import LockError, read_lock
from drank.project.files import file_sha256
from drank.project.git import GitError, head
from drank.project.params import Preset, Spectrum, asked
from drank.project.state import State, Variant, check_written, outs_of, read_state, sha256_of
from drank.tracking import view
from drank.tracking.names import LONGEST_PARAM, LONGEST_TAG, name_of, named
from drank.tracking.store import Store, open_store

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

PACKAGES = ("dvc", "lm-eval", "mlflow", "numpy", "scipy", "torch", "transformers")
COLUMNS = ("name", "layer", "kind", "form", "rank", "full_rank", "price", "effective_rank", "relative_loss")
METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow takes no more; a large model has more matrices
# Logged of a state beside its variants; the picture of precisions is there where weights have less than 16 bits.
FIGURES, PRECISION = "results/figures", "precision.png"
DOCUMENTS = ("results/summary.csv", "results/report.html", "params.yaml", "dvc.lock")
READ = ("params.yaml", "dvc.lock", "results", "data/allocation", "data/sampling", "data/evaluation")
# Parameters that can make two variants differ: by the short names that a variant has them under, and sections that it
# has as they are. The state has what all of its variants share.
SHORT = {
    "variant.preset": "preset", "variant.size_ratio": "size_ratio",
    "variant.bytes_ratio": "bytes_ratio", "variant.megabytes": "megabytes", "variant.spectrum": "spectrum",
    "preset.allocation": "allocation", "preset.storage": "storage", "model.source": "model",
}  # fmt: skip
OWN = ("variant.", "preset.", "spectrum.", "healing.")
SECTIONS = ("preset.", "spectrum.", "healing.", "sampling.", "covariance.")
OMITTED = ("preset.spectrum", "covariance.batch_windows", "covariance.threads")  # a repetition; the last bits at most
OPTIONAL = [f"preset.{key}" for key in Preset.model_fields] + [f"spectrum.{key}" for key in Spectrum.model_fields]


@dataclass(frozen=True)
class Tracked:
    """Names of a state's runs that were made, and of those that were there; the page, with the command that shows it;
    and the run of each variant."""

    created: tuple[str, ...]
    existing: tuple[str, ...]
    where: str
    runs: Mapping[str, "Run"] = field(repr=False)


def track(root: Path) -> Tracked:
    """Log the state of ``root/dvc.lock`` to MLflow, unless it is there.

    A state that was logged before it was committed gets the commit's hash from the first call after the commit.

    Raises:
        LockError: no lock, a variant without results, parameters or files that changed since ``dvc repro``.
        TrackingError: a store that cannot be used.
    """
    with held_state(root) as state, open_store(root) as store:
        return project(store, state, git_tags(root))


@contextmanager
def held_state(root: Path) -> Iterator[State]:
    """The state in a copy of its files: a ``dvc repro`` may change those of the workspace before they are logged.

    Raises:
        LockError: no finished state, or one that a ``dvc repro`` is changing.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        try:
            for path in READ:
                if (root / path).is_dir():
                    shutil.copytree(root / path, copy / path)
                elif (root / path).exists():
                    shutil.copyfile(root / path, copy / path)
            state = read_state(copy)
            check_written(copy, read_lock(copy / "dvc.lock"), "results/report.html")
        except (ValueError, FileNotFoundError, shutil.Error) as error:
            raise LockError(str(error).replace(f"{folder}/", "" if root == Path() else f"{root}/")) from error
        yield state


def project(store: Store, state: State, git: Mapping[str, str]) -> Tracked:
    """Make the runs of a state that are missing."""
    client, name = store.client, f"pipeline-{state.sha256[:8]}"
    tags = {name: _state_tags(state, git)}
    tags |= {variant.name: _variant_tags(state, variant, git) for variant in state.variants}
    query = f"tags.`dvc.lock_sha256` = '{state.sha256}' and tags.`drank.run` = 'pipeline'"
    present = client.search_runs([store.experiment_id], query, max_results=1)
    pipeline = present[0] if present else client.create_run(store.experiment_id, tags=tags[name], run_name=name)
    before = _finished(store, pipeline.info.run_id)
    missing = [variant for variant in state.variants if variant.name not in before]
    if missing or pipeline.info.status != "FINISHED":
        with _finishing(store, pipeline.info.run_id):
            _log_state(store, pipeline.info.run_id, state)
            for variant in missing:
                _log_variant(store, pipeline.info.run_id, state, variant, tags[variant.name])
    there = dict.fromkeys([name], pipeline) if present else {}
    there |= {variant: before[variant] for variant in tags if variant in before}
    for run, found in there.items():
        _follow_commit(store, found, tags[run])
    metrics = sorted({key for variant in state.variants for key in _figures(state, variant)})
    in_nats = (state.root / FIGURES / PRECISION).is_file()
    for key, value in view.experiment_tags(state.sha256, metrics, in_nats).items():
        client.set_experiment_tag(store.experiment_id, key, value)
    created = tuple(run for run in tags if run not in there)
    return Tracked(created, tuple(there), store.where_to_look(view.PAGE), _finished(store, pipeline.info.run_id))


def _finished(store: Store, parent: str) -> dict[str, "Run"]:
    """The variants that are logged whole, by name; runs that a killed call left half-made are deleted."""
    finished = {}
    for run in store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"):
        if run.info.status == "FINISHED":
            finished[run.data.tags["drank.variant"]] = run
        else:
            store.client.delete_run(run.info.run_id)
    return finished


@contextmanager
def _finishing(store: Store, run_id: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        store.client.set_terminated(run_id, "FAILED")
        raise
    store.client.set_terminated(run_id, "FINISHED")


def _follow_commit(store: Store, run: "Run", tags: Mapping[str, str]) -> None:
    """Name the commit of results that were committed, or that git refused to speak of, after they were logged."""
    before = run.data.tags
    if before.get("git.dirty") != "false" and tags.get("git.dirty") == "false":
        for key, value in tags.items():
            if before.get(key) != value:
                store.client.set_tag(run.info.run_id, key, value)
        if "git.unknown" in before:
            store.client.delete_tag(run.info.run_id, "git.unknown")


def _log_state(store: Store, run_id: str, state: State) -> None:
    shared = {k: v for k, v in state.variants[0].params.items() if not k.startswith(OWN)} if state.variants else {}
    _log(store, run_id, shared)
    store.client.log_artifacts(run_id, str(state.root / FIGURES), "figures")
    for path in DOCUMENTS:
        store.client.log_artifact(run_id, str(state.root / path))


def _log_variant(store: Store, parent: str, state: State, variant: Variant, tags: Mapping[str, str]) -> None:
    from drank.views.pictures import rank_heat_map

    client, allocation, own = store.client, variant.allocation, {**tags, "mlflow.parentRunId": parent}
    run_id = client.create_run(store.experiment_id, tags=own, run_name=variant.name).info.run_id
    with _finishing(store, run_id):
        _log(store, run_id, _params(variant), _metrics(state, variant))
        client.log_artifact(run_id, str(state.root / _allocation_of(variant)), "allocation")
        client.log_artifact(run_id, str(state.root / f"results/{variant.name}.json"), "results")
        ranks = {column: [getattr(unit, column) for unit in allocation.units] for column in COLUMNS}
        client.log_table(run_id, ranks, "ranks.json")
        client.log_figure(run_id, rank_heat_map([allocation.model_dump()]), "ranks.png")


def _log(store: Store, run_id: str, params: Mapping[str, str], metrics: Iterable["Metric"] = ()) -> None:
    """Log parameters and metrics, as many per call as MLflow takes."""
    from mlflow.entities import Param

    rows, measured = [Param(*row) for row in named(params, LONGEST_PARAM).items()], list(metrics)
    for start in range(0, len(rows), PARAMS_A_CALL):
        store.client.log_batch(run_id, params=rows[start : start + PARAMS_A_CALL])
    for start in range(0, len(measured), METRICS_A_CALL):
        store.client.log_batch(run_id, metrics=measured[start : start + METRICS_A_CALL])


def folder_of(variant: Variant) -> str:
    return f"data/models/{variant.name}"


def _allocation_of(variant: Variant) -> str:
    return f"data/allocation/{variant.name}.json"


def _params(variant: Variant) -> dict[str, str]:
    """All that can make two variants differ, under names that every variant has; "none" for what one does not use."""
    given = dict.fromkeys([*OPTIONAL, *SHORT], "none") | {key: value or "none" for key, value in variant.params.items()}
    short = {name: given.pop(key) for key, name in SHORT.items()} | {"healing": given.get("healing.objective", "none")}
    kept = {key: given[key] for key in given if key.startswith(SECTIONS) and key not in OMITTED}
    # The type that was used; params.yaml may leave it to the processor.
    dtype = variant.results.protocol.get("dtype")
    return short | kept | ({"compute.dtype": dtype} if dtype else {})


def _figures(state: State, variant: Variant) -> dict[str, float]:
    """Figures of the results that are worth a column, and what follows from them, as MLflow has them."""
    figures = {
        key: value
        for key, value in variant.results.figures.items()
        if key not in ("size_ratio", "bytes_ratio", "megabytes", "targeted_parameters")
        and not key.partition("/")[0].endswith(("_stderr", "word_perplexity"))
    }
    added = {"allocation/gap": variant.allocation.objective.gap}
    dense = next((other for other in state.variants if other.allocation.allocation == "dense"), None)
    for key, value in figures.items():
        metric, _, text = key.partition("/")
        if dense and metric == "token_perplexity":
            added[f"ppl_over_dense/{text}"] = ratio = value / dense.results.figures[key]
            added[f"nats_over_dense/{text}"] = math.log(ratio)
    return {name_of(key): value for key, value in (figures | added).items()}


def _metrics(state: State, variant: Variant) -> Iterator["Metric"]:
    """Figures; ranks, whose step is the layer; the loss of healing by its step."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    for key, value in _figures(state, variant).items():
        yield Metric(key, value, now, step=0)
    for unit in variant.allocation.units:
        yield Metric(name_of(f"rank/{unit.kind}"), unit.rank, now, step=unit.layer)
    for row in variant.loss_curve:
        for key in ("loss", "learning_rate"):
            yield Metric(f"healing/{key}", row[key], now, step=int(row["step"]))


def _state_tags(state: State, git: Mapping[str, str]) -> dict[str, str]:
    lines = [f"* {v.name}: kept {v.results.figures['kept_ratio']:.4f}" for v in state.variants]
    note = "\n".join(["Everything that one state of `dvc.lock` holds, a run per variant:", "", *lines, "", _links(git)])
    versions = {f"version.{package}": version(package) for package in PACKAGES}
    return _tags(state, git, versions | {"drank.run": "pipeline"}, "dvc repro", note)


def _variant_tags(state: State, variant: Variant, git: Mapping[str, str]) -> dict[str, str]:
    """The way to the variant, by hash: commit, lock, allocation, model folder, and every out on the way."""
    outs, stage = outs_of(variant.stages), f"dvc repro release@{variant.name}"
    sha256, md5 = file_sha256(state.root / _allocation_of(variant)), outs[folder_of(variant)]
    made, figures = variant.allocation, variant.results.figures
    size = asked(made.model_dump()) + ("" if made.size_ratio is None else " of the targeted parameters")
    note = (
        f"Preset **{made.preset}** (allocation `{made.allocation}`, storage `{made.storage}`, factors "
        f"`{made.spectrum}`), {size} asked, {figures['kept_ratio']:.4f} kept: "
        f"{figures['parameters']:,} parameters, {figures['bytes'] / 1e6:.1f} MB. Rebuild with `{stage}`, "
        f"verify with `drank audit {folder_of(variant)}`. {_links(git)}\n\n"
        f"* allocation `{_allocation_of(variant)}`: sha256 `{sha256}`\n"
        f"* model `{folder_of(variant)}`: md5 in dvc.lock `{md5}`\n"
        f"* stages of `dvc.lock`: sha256 `{state.sha256}`\n"
    )
    own = {
        "drank.run": "variant",
        "drank.variant": variant.name,
        "dvc.stages_sha256": sha256_of(variant.stages),
        "allocation.sha256": sha256,
        "model.dvc_md5": md5,
        **{f"dvc.out.{path}": md5 for path, md5 in outs.items()},
    }
    return _tags(state, git, own, stage, note)


def _tags(state: State, git: Mapping[str, str], own: Mapping[str, str], source: str, note: str) -> dict[str, str]:
    shared = {"drank.version": __version__, "dvc.lock_sha256": state.sha256}
    return named({**shared, "mlflow.source.name": source, "mlflow.note.content": note, **own, **git}, LONGEST_TAG)


def _links(git: Mapping[str, str]) -> str:
    if "git.unknown" in git:
        return f"The commit is not known: {git['git.unknown']}."
    if "git.commit" not in git:
        return "Made outside git."
    return f"Commit `{git['git.commit']}`{', changed and not committed since' * (git['git.dirty'] == 'true')}."


def git_tags(root: Path) -> dict[str, str]:
    """Commit and whether the tree differs from it; nothing outside git, no commit before the first one.

    ``git.unknown`` has git's words where there is a repository and no answer.
    """
    try:
        found = head(root)
    except GitError as error:
        return {"git.unknown": str(error)}
    if found is None:
        return {}
    commit, is_dirty = found
    tags = {"git.dirty": "true" if is_dirty else "false"}
    return tags | ({"git.commit": commit, "mlflow.source.git.commit": commit} if commit else {})
