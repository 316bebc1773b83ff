"""`drank promote`: one answer to "which allocation made the champion?" from MLflow, from git and from the folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.promote import TagError, UncommittedError
from drank.project.dvc import LockError
from drank.project.files import read_json
from drank.project.params import ParamsError
from drank.tracking import PromotionError, TrackingError, VariantRun, find_runs, track
from tests.test_tracking import Runs, edit_params, repro, run, write_project

STORE = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "DVC_ROOT")


@pytest.fixture(autouse=True)
def no_store_named(monkeypatch):
    for name in STORE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The toy pipeline of test_tracking, reproduced and committed, with a user for tags; to be copied."""
    root = tmp_path_factory.mktemp("committed") / "project"
    write_project(root)
    run(root, "git", "config", "user.name", "someone")
    run(root, "git", "config", "user.email", "someone@example.org")
    repro(root)
    commit(root)
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root


@pytest.fixture
def project(committed, tmp_path):
    return shutil.copytree(committed, tmp_path / "project", symlinks=True)


def commit(root: Path) -> str:
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-q", "--allow-empty", "-m", "results")
    return run(root, "git", "rev-parse", "HEAD").strip()


def promote(root: Path, variant: str) -> str:
    """What the command prints; its error, if it has one, is raised."""
    result = CliRunner().invoke(commands, ["promote", variant, "--root", str(root)])
    if result.exception:
        raise result.exception
    return result.stdout


def versions(root: Path):
    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_model_versions("name = 'drank'")


def answers(root: Path, printed: str) -> tuple[dict[str, str], str, str]:
    """The questions that the command prints, asked as they are printed: of git, of MLflow, of the folder."""
    asked = dict(line.split("  ", 1) for line in printed.splitlines() if line.startswith("ask "))
    environment = {key: value for key, value in os.environ.items() if key not in STORE}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    git, mlflow, folder = (
        subprocess.run(question.strip(), shell=True, cwd=root, env=environment, capture_output=True, text=True)
        for question in asked.values()
    )
    assert (git.returncode, mlflow.returncode, folder.returncode) == (0, 0, 0), (git, mlflow, folder)
    tag = dict(line.split(": ", 1) for line in git.stdout.splitlines() if line)
    return tag, mlflow.stdout.strip(), folder.stdout.split()[0]


def test_git_mlflow_and_the_folder_give_one_answer_whichever_variant_is_promoted(project):
    for variant, version in (("d-rank-80", 1), ("dense", 2), ("d-rank-80", 1)):
        tag, from_mlflow, from_folder = answers(project, promote(project, variant))
        expected = hashlib.sha256((project / f"data/allocation/{variant}.json").read_bytes()).hexdigest()
        assert tag["allocation_sha256"] == from_mlflow == from_folder == expected
        (subject,) = read_json(project / f"data/models/{variant}/provenance.json")["subject"]
        assert subject["digest"]["sha256"] == expected
        assert tag["variant"] == variant
        lock = yaml.safe_load(run(project, "git", "show", "champion:dvc.lock"))
        assert tag["model_dvc_md5"] == lock["stages"][f"release@{variant}"]["outs"][0]["md5"]
        champion = Runs(project).client.get_model_version_by_alias("drank", "champion")
        assert (champion.tags["drank.variant"], int(champion.version)) == (variant, version)
        assert champion.tags["model.dvc_md5"] == tag["model_dvc_md5"]
    assert len(versions(project)) == 2


def test_a_version_points_to_its_run_and_holds_no_weights(project):
    printed = promote(project, "d-rank-80")
    (version,) = versions(project)
    runs = Runs(project)
    source = runs.one_state()[1]["d-rank-80"]
    assert version.run_id == source.info.run_id
    assert version.source == f"models:/{source.outputs.model_outputs[0].model_id}"
    (model,) = (runs.client.get_logged_model(output.model_id) for output in source.outputs.model_outputs)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "drank", "version": 1}]
    assert version.tags["git.commit"] == run(project, "git", "rev-parse", "HEAD").strip()
    assert version.tags["dvc.path"] == "data/models/d-rank-80"
    assert version.tags["dvc.lock_sha256"] == source.data.tags["dvc.lock_sha256"]
    assert source.info.run_id in printed
    assert "version 1 of registered model drank (new)" in printed
    assert not list((project / "mlartifacts").rglob("*.safetensors"))


def test_the_same_folder_again_changes_nothing(project):
    promote(project, "dense")
    before = run(project, "git", "for-each-ref"), [dict(version) for version in versions(project)]
    assert "version 1 of registered model drank (as before)" in promote(project, "dense")
    assert (run(project, "git", "for-each-ref"), [dict(version) for version in versions(project)]) == before


def test_the_same_folder_from_another_state_is_the_same_version_and_the_tag_follows(project):
    promote(project, "dense")
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    second = commit(project)
    promote(project, "dense")
    assert len(Runs(project).pipelines) == 2
    assert len(versions(project)) == 1
    assert run(project, "git", "rev-parse", "champion^{commit}").strip() == second


def test_another_folder_of_the_same_name_is_another_version(project):
    promote(project, "d-rank-80")
    edit_params(project, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(project)
    commit(project)
    promote(project, "d-rank-80")
    assert [version.tags["drank.variant"] for version in versions(project)] == ["d-rank-80"] * 2
    assert len({version.tags["allocation.sha256"] for version in versions(project)}) == 2


def test_a_later_commit_with_the_same_lock_leaves_the_tag_where_it_is(project):
    promote(project, "dense")
    tagged = run(project, "git", "rev-parse", "champion^{commit}")
    (project / "notes.txt").write_text("docs")
    assert commit(project) != tagged.strip()
    promote(project, "dense")
    assert run(project, "git", "rev-parse", "champion^{commit}") == tagged


def test_outside_git_the_registry_alone_is_moved(committed, tmp_path):
    root = shutil.copytree(committed, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns(".git"))
    assert "git tag    none: not in a git repository with a commit" in promote(root, "dense")
    assert len(versions(root)) == 1


def uncommitted(root):
    edit_params(root, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(root)


def without_user(root):
    for key in ("user.name", "user.email"):
        run(root, "git", "config", "--unset", key)
    run(root, "git", "config", "user.useConfigOnly", "true")


BAD = {
    "unknown variant": (
        "d-rank",
        lambda root: None,
        ParamsError,
        "no variant 'd-rank' in params.yaml; it has: dense, d-",
    ),
    "no lock": (
        "dense",
        lambda root: (root / "dvc.lock").unlink(),
        LockError,
        r"dvc\.lock: not found; run `dvc repro`",
    ),
    "not committed": (
        "d-rank-80",
        uncommitted,
        UncommittedError,
        r"params\.yaml, dvc\.lock, data/allocation/d-rank-80\.json, results/d-rank-80\.json: not committed as they "
        r"are, so no commit would say what made d-rank-80; `git add .* && git commit` first",
    ),
    "no weights": (
        "dense",
        lambda root: shutil.rmtree(root / "data/models/dense"),
        PromotionError,
        "data/models/dense: not found; fetch it with `dvc checkout`",
    ),
    "edited weights": (
        "dense",
        lambda root: (root / "data/models/dense/more.txt").write_text("x"),
        PromotionError,
        r"data/models/dense: edited or stale: its md5 is \w+\.dir, but dvc\.lock has \w+\.dir; run `dvc checkout",
    ),
    "no user": ("dense", without_user, TagError, "git tag --annotate .*: .*user"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_promoted_is_refused(project, monkeypatch, case):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    variant, damage, error, message = BAD[case]
    damage(project)
    with pytest.raises(error, match=f"(?s){message}"):
        promote(project, variant)
    assert run(project, "git", "tag") == ""


def test_a_store_that_mlflow_refuses_is_named_and_nothing_is_tagged(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    with pytest.raises(TrackingError, match="is MLFLOW_TRACKING_URI right"):
        promote(project, "dense")
    assert run(project, "git", "tag") == ""


def test_errors_reach_the_user_as_one_message(project):
    program = [str(Path(sys.executable).parent / "drank"), "promote", "nobody"]
    done = subprocess.run(program, cwd=project, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: no variant 'nobody' in params.yaml; it has: dense, d-rank-80\n"


def test_a_folder_leads_back_to_its_runs(project):
    promote(project, "d-rank-80")
    md5 = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["release@d-rank-80"]["outs"][0]["md5"]
    runs = Runs(project)
    expected = VariantRun(
        run_id=runs.one_state()[1]["d-rank-80"].info.run_id,
        name="d-rank-80",
        experiment="drank",
        link=f"http://127.0.0.1:5000/#/experiments/{runs.experiment.experiment_id}/runs/"
        f"{runs.one_state()[1]['d-rank-80'].info.run_id}",
        allocation_sha256=hashlib.sha256((project / "data/allocation/d-rank-80.json").read_bytes()).hexdigest(),
        version=1,
        champion=True,
    )
    assert find_runs(project, md5) == [expected]
    promote(project, "dense")
    (found,) = find_runs(project, md5)
    assert (found.version, found.champion) == (1, False)
    assert find_runs(project, "0" * 32 + ".dir") == []


def test_looking_for_runs_creates_nothing(project, monkeypatch, tmp_path):
    (project / "mlflow.db").unlink()
    assert find_runs(project, "0" * 32 + ".dir") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert find_runs(project, "0" * 32 + ".dir") is None
    assert not list(tmp_path.glob("**/*.db"))


def test_a_store_without_our_experiment_has_no_runs_to_look_for(project):
    assert find_runs(project, "0" * 32 + ".dir") is None


def test_a_server_that_is_not_there_is_an_error_soon(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match="is MLFLOW_TRACKING_URI right"):
        find_runs(project, "0" * 32 + ".dir")


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


def test_variants_of_experiments_are_tracked_and_compared_by_dvc_alike(project):
    """`dvc exp run`, in the workspace and queued, ends in states that `drank track` takes like any other."""
    track(project)
    dvc(project, "exp", "run", "--name", "seventy", "-S", "variants.d-rank-80.size_ratio=0.7")
    track(project)
    run(project, "git", "checkout", "-q", ".")
    dvc(project, "checkout")
    dvc(project, "exp", "run", "--queue", "--name", "half", "-S", "variants.d-rank-80.size_ratio=0.5")
    dvc(project, "exp", "run", "--run-all")
    for name in ("half", "seventy"):
        dvc(project, "exp", "apply", name)
        track(project)
    runs = Runs(project)
    ratios = [runs.variants(pipeline)["d-rank-80"].data.params["size_ratio"] for pipeline in runs.pipelines]
    assert sorted(ratios) == ["0.5", "0.7", "0.8"]
    parameters = json.loads(dvc(project, "params", "diff", "--json", "half", "seventy"))
    (change,) = parameters["params.yaml"].items()
    assert (change[0], change[1]["old"], change[1]["new"]) == ("variants.d-rank-80.size_ratio", 0.5, 0.7)
    metrics = json.loads(dvc(project, "metrics", "diff", "--json", "half", "seventy"))
    perplexity = metrics["results/d-rank-80.json"]["token_perplexity/news"]
    logged = {
        r.data.params["size_ratio"]: r.data.metrics for p in runs.pipelines for r in [runs.variants(p)["d-rank-80"]]
    }
    assert perplexity["old"] == logged["0.5"]["token_perplexity/news"]
    assert perplexity["new"] == logged["0.7"]["token_perplexity/news"]
    dvc(project, "plots", "diff", "half", "seventy", "--out", "comparison")
    assert "half" in (project / "comparison/index.html").read_text()
