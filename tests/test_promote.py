"""`drank promote`: one answer to "which allocation made the champion?" from MLflow, from git and from the folder."""

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from drank.cli import commands
from drank.cli.promote import TagError, UncommittedError
from drank.cli.promote import promote as command
from drank.project.dvc import LockError
from drank.project.files import read_json
from drank.project.git import GitError
from drank.project.params import ParamsError
from drank.tracking import PromotionError, TrackingError, VariantRun, find_runs, track
from tests import conftest
from tests.toy import Runs, commit, edit_params, repro, run


@pytest.fixture
def project(toy_project):
    return toy_project


def promote(root: Path, variant: str) -> str:
    """Output of the command, after a commit where dvc.yaml had another champion; an error is raised."""
    result = CliRunner().invoke(commands, ["promote", variant, "--root", str(root)])
    if isinstance(result.exception, UncommittedError) and "then promote again" in str(result.exception):
        commit(root)
        result = CliRunner().invoke(commands, ["promote", variant, "--root", str(root)])
    if result.exception:
        raise result.exception
    return result.stdout


def versions(root: Path):
    return Runs(root).client.search_model_versions("name = 'drank'")


def md5_of(root: Path, variant: str) -> str:
    return yaml.safe_load((root / "dvc.lock").read_text())["stages"][f"release@{variant}"]["outs"][0]["md5"]


def shrink(root: Path) -> None:
    edit_params(root, "variants", "d-rank-80", "size_ratio", value=0.6)
    repro(root)


def answers(root: Path, printed: str) -> tuple[dict[str, str], str, str]:
    """The questions that the command prints, asked as they are printed: of git, of MLflow, of the folder."""
    asked = dict(line.split("  ", 1) for line in printed.splitlines() if line.startswith("ask "))
    git, folder = (
        subprocess.run(asked[f"ask {whom}"], shell=True, cwd=root, check=True, capture_output=True, text=True).stdout
        for whom in ("git", "the folder")
    )
    *python, program = shlex.split(asked["ask MLflow"])
    assert python == ["python", "-c"]
    with redirect_stdout(io.StringIO()) as mlflow:
        exec(program, {})
    return dict(line.split(": ", 1) for line in git.splitlines() if line), mlflow.getvalue().strip(), folder.split()[0]


def test_git_mlflow_and_the_folder_give_one_answer(project):
    tag, from_mlflow, from_folder = answers(project, printed := promote(project, "d-rank-80"))
    expected = hashlib.sha256((project / "data/allocation/d-rank-80.json").read_bytes()).hexdigest()
    assert tag["allocation_sha256"] == from_mlflow == from_folder == expected
    (subject,) = read_json(project / "data/models/d-rank-80/provenance.json")["subject"]
    assert subject["digest"]["sha256"] == expected
    assert tag["variant"] == "d-rank-80"
    lock = yaml.safe_load(run(project, "git", "show", "champion@v1.0.0:dvc.lock"))
    assert tag["model_dvc_md5"] == lock["stages"]["release@d-rank-80"]["outs"][0]["md5"]
    # The version points to its run and holds no weights.
    (version,), source = versions(project), Runs(project).one_state()[1]["d-rank-80"]
    assert (version.run_id, version.source) == (source.info.run_id, source.info.artifact_uri)
    expected = {"git.commit": run(project, "git", "rev-parse", "HEAD").strip(), "dvc.path": "data/models/d-rank-80"}
    expected |= {"dvc.lock_sha256": source.data.tags["dvc.lock_sha256"], "model.dvc_md5": tag["model_dvc_md5"]}
    assert expected.items() <= version.tags.items()
    assert source.info.run_id in printed
    assert "version 1 of registered model drank (new)" in printed
    assert not list((project / "mlartifacts").rglob("*.safetensors"))


def test_a_folder_is_one_version_whatever_is_promoted_when_and_the_tag_follows_the_lock(project):
    for tagged, (variant, version) in enumerate((("d-rank-80", 1), ("dense", 2), ("d-rank-80", 1)), start=1):
        promote(project, variant)
        champion = Runs(project).client.get_model_version_by_alias("drank", "champion")
        assert (champion.tags["drank.variant"], int(champion.version)) == (variant, version)
        assert f"variant: {variant}\n" in run(
            project, "git", "tag", "-l", "--format=%(contents)", f"champion@v{tagged}.*"
        )

    def seen():
        return run(project, "git", "for-each-ref", "refs/tags"), [dict(version) for version in versions(project)]

    before = seen()
    assert "version 1 of registered model drank (as before)" in promote(project, "d-rank-80")
    (project / "notes.txt").write_text("a later commit with the same lock")
    later = commit(project)
    promote(project, "d-rank-80")
    assert seen() == before
    assert later not in before[0]

    shrink(project)
    another = commit(project)
    promote(project, "dense")  # the same folder, in another state
    assert len(versions(project)) == 2
    assert run(project, "git", "rev-parse", "champion@v4.0.0^{commit}^").strip() == another
    promote(project, "d-rank-80")  # the same name, another folder
    assert sorted(version.tags["drank.variant"] for version in versions(project)) == ["d-rank-80", "d-rank-80", "dense"]
    assert len({version.tags["allocation.sha256"] for version in versions(project)}) == 3


def test_outside_git_the_registry_alone_is_moved(project):
    shutil.rmtree(project / ".git")
    assert "git tag    none: not in a git repository with a commit" in promote(project, "dense")
    assert len(versions(project)) == 1


def without_user(root):
    for key in ("user.name", "user.email"):
        run(root, "git", "config", "--unset", key)
    run(root, "git", "config", "user.useConfigOnly", "true")


BAD = {
    "unknown variant": ("d-rank", lambda root: None, ParamsError, "no variant 'd-rank' in params.yaml; it has: dense"),
    "no lock": ("dense", lambda root: (root / "dvc.lock").unlink(), LockError, r"dvc\.lock: not found; run `dvc repro"),
    "not committed": (
        "d-rank-80", shrink, UncommittedError,
        r"params\.yaml, dvc\.lock, data/allocation/.*, results/.*: not committed as they are, .* && git commit` first",
    ),
    "no weights": (
        "dense", lambda root: shutil.rmtree(root / "data/models/dense"), PromotionError,
        "data/models/dense: not found; fetch it with `dvc checkout`",
    ),
    "edited weights": (
        "dense", lambda root: (root / "data/models/dense/more.txt").write_text("x"), PromotionError,
        r"data/models/dense: edited or stale: its md5 is \w+\.dir, but dvc\.lock has \w+\.dir; run `dvc checkout",
    ),
    "no user": ("dense", without_user, GitError, "`git var` says: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_promoted_is_refused(project, monkeypatch, case):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    variant, damage, error, message = BAD[case]
    damage(project)
    with pytest.raises(error, match=f"(?s){message}"):
        promote(project, variant)
    assert run(project, "git", "tag") == ""


def test_a_folder_leads_back_to_its_runs(project):
    md5 = md5_of(project, "d-rank-80")
    promote(project, "d-rank-80")
    runs = Runs(project)
    run_id = runs.one_state()[1]["d-rank-80"].info.run_id
    expected = VariantRun(
        run_id=run_id,
        name="d-rank-80",
        experiment="drank",
        link=f"http://127.0.0.1:5000/#/experiments/{runs.experiment.experiment_id}/runs/{run_id}",
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
    with pytest.raises(TrackingError, match="no MLflow store here: `drank track` makes one"):
        find_runs(project, "0" * 32 + ".dir")  # no experiment of ours
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(TrackingError, match="no MLflow store here"):
        find_runs(project, "0" * 32 + ".dir")
    assert not (tmp_path / "other.db").exists()


def test_a_server_that_is_not_there_is_an_error_soon(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    md5 = md5_of(project, "dense")
    for call in (find_runs, project, md5), (promote, project, "dense"):
        with pytest.raises(TrackingError, match="is MLFLOW_TRACKING_URI right"):
            call[0](*call[1:])
    assert run(project, "git", "tag") == ""


def dvc(root: Path, *arguments: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments)


def test_variants_of_experiments_are_tracked_and_compared_by_dvc_alike(project):
    """`dvc exp run` and `dvc exp apply` end in states that `drank track` takes like any other."""
    dvc(project, "exp", "run", "--name", "half", "-S", "variants.d-rank-80.size_ratio=0.5")
    run(project, "git", "checkout", "-q", ".")
    track(project)
    (change,) = json.loads(dvc(project, "params", "diff", "--json", "half"))["params.yaml"].items()
    assert (change[0], change[1]["old"], change[1]["new"]) == ("variants.d-rank-80.size_ratio", 0.5, 0.8)
    metrics = json.loads(dvc(project, "metrics", "diff", "--json", "half"))
    dvc(project, "plots", "diff", "half", "--out", "comparison")
    assert "half" in (project / "comparison/index.html").read_text()
    dvc(project, "exp", "apply", "half")
    track(project)
    runs = Runs(project)
    half, whole = (runs.variants(pipeline)["d-rank-80"].data for pipeline in runs.pipelines)
    assert [data.params["size_ratio"] for data in (half, whole)] == ["0.5", "0.8"]
    perplexity = metrics["results/d-rank-80.json"]["token_perplexity/news"]
    assert perplexity["old"] == half.metrics["token_perplexity/news"]
    assert perplexity["new"] == whole.metrics["token_perplexity/news"]


def test_dvc_gets_the_champion_from_a_repository_by_version_and_stage(project, tmp_path):
    """`dvc artifacts get` as somebody without drank runs it, from another folder; the remote alone has the weights."""

    def got(*options: str) -> str:
        here = tmp_path / "-".join(("got", *options)).replace("/", "-")
        here.mkdir()
        conftest.run(here, sys.executable, "-m", "dvc", "artifacts", "get", str(project), "champion", *options)
        (folder,) = here.iterdir()
        assert folder.name in ("dense", "d-rank-80")
        assert (folder / "model.safetensors").read_text() == f"weights of {folder.name}"
        return folder.name

    dvc(project, "remote", "add", "--default", "store", str(tmp_path / "store"))
    for variant in ("d-rank-80", "dense"):
        commit(project)
        promote(project, variant)
    dvc(project, "push")
    shutil.rmtree(project / ".dvc/cache")
    assert got() == got("--rev", "v2.0.0") == "dense"
    assert got("--rev", "v1.0.0") == "d-rank-80"
    gto = [str(Path(sys.executable).with_name("gto"))]
    run(project, *gto, "assign", "champion", "--version", "v1.0.0", "--stage", "prod")
    assert got("--stage", "prod") == "d-rank-80"
    assert "v2.0.0" in run(project, *gto, "show", "champion")


def test_a_new_champion_is_written_into_dvc_yaml_in_one_line_and_must_be_committed(project):
    before = (project / "dvc.yaml").read_text()
    for said in (r"is data/models/dense now, .* `git commit -m 'Champion: dense'", "not committed as they are"):
        with pytest.raises(UncommittedError, match=said):
            command("dense", project)
    assert (project / "dvc.yaml").read_text() == before.replace(
        "path: data/models/d-rank-80", "path: data/models/dense"
    )
    assert not run(project, "git", "tag")
    (project / "dvc.yaml").write_text(before[: before.index("artifacts:")])
    commit(project)
    with pytest.raises(
        TagError, match="(?s)no artifact `champion` .* add it, and commit it:.* path: data/models/dense"
    ):
        command("dense", project)
