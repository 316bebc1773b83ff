"""MLflow's store and git beside it: any folder, any name, no secret in what is said, two stores that move as one."""

import logging
import os
import posixpath
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from drank.cli import commands
from drank.cli.promote import TagError, UncommittedError, declare
from drank.cli.promote import promote as command
from drank.preflight import preflight
from drank.project import git
from drank.project.command import run_app
from drank.project.git import GitError
from drank.project.redaction import redact, redact_logs
from drank.tracking import TrackingError, open_store, track
from drank.tracking.names import LONGEST_NAME, LONGEST_PARAM, name_of, named
from drank.tracking.store import Store, sqlite_file, sqlite_uri
from tests import conftest
from tests.test_promote import promote
from tests.toy import REPOSITORY, VARIANTS, Runs, commit, run, serving

SOURCE = REPOSITORY / "src"

# Where the store is


@pytest.mark.parametrize("name", ["c# 50%41 wha?t ö 日本 a&b=c;d it's me@host:8", "file:x?uri=true"])
def test_a_project_in_any_folder_has_its_store_inside(toy_project, tmp_path, monkeypatch, name):
    root = tmp_path / name / "project"
    assert sqlite_file(sqlite_uri(root / "mlflow.db")) == root / "mlflow.db"
    root.parent.mkdir()
    toy_project.rename(root)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = track(root).where
    assert {path.name for path in tmp_path.iterdir()} == {"here", name}
    assert [path.name for path in (*(tmp_path / name).iterdir(), *(tmp_path / "here").iterdir())] == ["project"]
    assert list((root / "mlartifacts").rglob("report.html"))
    client = MlflowClient(tracking_uri=shlex.split(said)[3])
    assert client.get_experiment_by_name("drank").artifact_location == (root / "mlartifacts").as_uri()
    assert track(root).created == ()


@pytest.mark.parametrize(
    "uri", ["sqlite:///x.db", "sqlite+pysqlite:///file:{}/x.db?uri=true", "sqlite:///{}/x.db?timeout=9"]
)
def test_the_address_of_a_database_may_name_a_driver_and_options(toy_project, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    (toy_project / "mlflow.db").rename(tmp_path / "x.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(tmp_path))
    with open_store(toy_project) as store:
        said = shlex.split(store.where_to_look("runs"))
    assert said[:4] == ["mlflow", "ui", "--backend-store-uri", uri.format(tmp_path)]
    assert {path.name for path in tmp_path.iterdir()} == {"project", "x.db"}


# What it is told

NAMES = (
    "exact_match,strict-match/gsm8k", "acc/arc:challenge", "maj@8/math", "f(x) = 50%", "日本語/é", "new\nline", "a//b",
    "/a", "a/", "a/../b", ".", "..", "...", "", "x" * 300, "x" * 299 + "y", "rank/`q`'s", "a:2Cb", "a,b", "::",
)  # fmt: skip


def test_mlflow_takes_every_name_and_value_and_keeps_them_apart(toy_project):
    client = Runs(toy_project).client
    run_id = client.create_run("0").info.run_id
    translated = [name_of(name) for name in NAMES]
    assert len(set(translated)) == len(NAMES)
    values = named({name: "v" * 5999 + name + "w" * 9 for name in NAMES}, LONGEST_PARAM)
    client.log_batch(
        run_id,
        metrics=[Metric(name, 1.0, 0, 0) for name in translated],
        params=[Param(name, value) for name, value in values.items()],
        tags=[RunTag(name, "") for name in translated],
    )
    logged = client.get_run(run_id).data
    assert logged.metrics.keys() == logged.params.keys() == set(translated)
    assert logged.params == values
    assert len(set(values.values())) == len(NAMES)
    assert name_of("exact_match,strict-match/gsm8k") == "exact_match:2Cstrict-match/gsm8k"
    for name in ("token_perplexity/news", "dvc.out.data/models/d-rank-80", "version.lm-eval", "acc_norm/last word"):
        assert name_of(name) == name


@given(st.text(max_size=300), st.text("a/.:,", max_size=5))
def test_a_translated_name_is_one_that_mlflow_takes_and_says_which_it_was(some, tricky):
    for name in (some, tricky):
        found = name_of(name)
        assert len(found) <= LONGEST_NAME
        assert re.fullmatch(r"[/\w.\- :]+", found)
        assert posixpath.normpath(found) == found
        assert not found.startswith(("/", ".."))
        if "::" not in found and found != ":":
            assert re.sub("((?::[0-9A-F]{2})+)", decoded, found) == name


def decoded(found: re.Match[str]) -> str:
    return bytes.fromhex(found[0].replace(":", "")).decode()


# What is said

WORD, NOBODY = "hunter22", "127.0.0.1:9"  # where no server listens


SECRETS = (
    "http://me:hunter22@{}", "http://hunter22@{}", "http://{}/?token=hunter22", "http://me:x/hunter22@{}",
    "http://me:x%40hunter22@{}/a b", "http://me:x#hunter22@{}", "postgresql://me:hunter22@{}/db", "ftp://me:hunter22@{}",
    "sqlite:////dev/null/x.db?key=hunter22",
)  # fmt: skip


@pytest.mark.parametrize("address", SECRETS)
def test_no_secret_of_an_address_is_said(toy_project, monkeypatch, capfd, address):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())  # which the command wraps
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(NOBODY))
    assert WORD not in "".join(finding.text for finding in preflight(toy_project))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for asked in (["track"], ["promote", "d-rank-80"]):
        monkeypatch.setattr("sys.argv", ["drank", *asked, "--root", str(toy_project)])
        with pytest.raises(SystemExit) as end:
            run_app(commands)
        said = "".join(capfd.readouterr())
        assert end.value.code == 1
        assert said
        assert WORD not in said
        if address.startswith("http://me:hunter22"):
            assert "is MLFLOW_TRACKING_URI right" in said
            assert NOBODY in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://me:pw@host/a failed", "GET https://***@host/a failed"),
        ("clone https://ghp_123@github.com/a.git", "clone https://***@github.com/a.git"),
        ("https://host/x?a=1&api_key=pw&b=2", "https://host/x?a=1&api_key=***&b=2"),
        ("s3://b/k?X-Amz-Signature=abc'", "s3://b/k?X-Amz-Signature=***'"),
        ("Authorization: Bearer eyJhbGciOi.J9", "Authorization: Bearer ***"),
        ("the token of-the-environment, of%2Dthe%2Denvironment", "the token ***, of%2Dthe%2Denvironment"),
        ("me@host, https://host/a@b?c=d, sqlite:////a/b@c.db", "me@host, https://host/a@b?c=d, sqlite:////a/b@c.db"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(monkeypatch, text, expected):
    monkeypatch.setenv("SOME_TOKEN", "of-the-environment")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    assert redact(text) == expected


def test_no_secret_is_logged_or_in_the_traceback_of_a_bug(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WORD)
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    redact_logs()
    try:
        raise OSError(f"https://me:pw@host {WORD}")
    except OSError:
        logging.getLogger("urllib3").exception("%s failed", "https://me:pw@host")
    assert "https://***@host failed" in caplog.text
    assert "OSError: https://***@host ***" in caplog.text
    program = (
        "import typer; from drank.project.command import run_stage\n"
        "def main(): raise RuntimeError('https://me:pw@host')\n"
        "run_stage(main)"
    )
    done = conftest.run(tmp_path, "python", "-c", program, check=False, path=SOURCE)
    assert "RuntimeError: https://***@host" in done.stderr


HIDDEN = 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"\nthen http://127.0.0.1:5000/#/experiments/3/runs/1'


def test_the_way_to_a_store_has_no_password():
    for uri, said in (
        ("https://user:secret@host:8080/mlflow/", "https://host:8080/mlflow/#/experiments/3/runs/1"),
        ("postgresql://me:secret@host/db", HIDDEN),
        ("mysql+pymysql://me:secret@host/db", HIDDEN),
        ("mssql+pyodbc://:secret@host/db", HIDDEN),
    ):
        assert Store(uri, MlflowClient("http://127.0.0.1"), "3").where_to_look("runs/1") == said


def test_the_way_to_a_repository_has_no_password(tmp_path):
    run(tmp_path, "git", "init", "-q")
    for url, expected in (
        ("https://me:ghp_123@github.com/a.git", "https://github.com/a.git"),
        ("https://ghp_123@github.com/a.git", "https://github.com/a.git"),
        ("https://github.com/a@b.git", "https://github.com/a@b.git"),
        ("git@github.com:a.git", "git@github.com:a.git"),
    ):
        run(tmp_path, "git", "config", "remote.origin.url", url)
        assert git.origin(tmp_path) == expected


# git that cannot say


@pytest.mark.parametrize("fault", ["dubious ownership", "git is not installed"])
def test_git_that_cannot_say_is_not_taken_for_no_git_and_is_asked_again(toy_project, monkeypatch, fault):
    with monkeypatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        if fault == "dubious ownership":
            patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        else:
            patch.setattr(git, "GIT", ("no-such-git",))
        track(toy_project)
        for run_of_it in Runs(toy_project).all:
            assert fault in run_of_it.data.tags["git.unknown"]
            assert "The commit is not known: " in run_of_it.data.tags["mlflow.note.content"]
            assert "git.commit" not in run_of_it.data.tags
        with pytest.raises(TagError, match=f"no commit can be tagged: .*{fault}"):
            promote(toy_project, "dense")
        assert Runs(toy_project).client.search_registered_models() == []
    assert track(toy_project).created == ()
    for run_of_it in Runs(toy_project).all:
        assert run_of_it.data.tags["git.commit"] == run(toy_project, "git", "rev-parse", "HEAD").strip()
        assert "git.unknown" not in run_of_it.data.tags
        assert "not known" not in run_of_it.data.tags["mlflow.note.content"]


# Two stores, one step


def champions(root: Path, client: MlflowClient | None = None) -> tuple[str, str]:
    """The champion by MLflow, and by git."""
    version = (client or Runs(root).client).get_model_version_by_alias("drank", "champion")
    tags = run(root, "git", "tag", "-l", "--sort=-version:refname", "--format=%(contents)", "champion@*")
    return version.tags["drank.variant"], re.search("^variant: (.*)$", tags, re.MULTILINE)[1]


def config(*pairs):
    def change(root):
        for key, value in pairs:
            run(root, "git", "config", key, value)

    return change


def with_hook(root):
    hook = root / ".git/hooks/reference-transaction"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)


def test_where_git_refuses_nothing_moves(toy_project):
    promote(toy_project, "dense")
    with pytest.raises(UncommittedError):
        declare(toy_project, "d-rank-80")
    commit(toy_project)
    kept = shutil.copytree(toy_project / ".git", toy_project.parent / "kept")
    for refuse in (
        config(("tag.gpgSign", "true"), ("gpg.program", "/nowhere/gpg")),
        config(("user.name", ""), ("user.useConfigOnly", "true")),
        with_hook,
        lambda root: (root / ".git/refs/tags/champion@v2.0.0.lock").touch(),
    ):
        refuse(toy_project)
        with pytest.raises(GitError, match="git .* says"):
            promote(toy_project, "d-rank-80")
        assert champions(toy_project) == ("dense", "dense")
        shutil.rmtree(toy_project / ".git")
        shutil.copytree(kept, toy_project / ".git")
    promote(toy_project, "d-rank-80")
    assert champions(toy_project) == ("d-rank-80", "d-rank-80")


def test_tags_that_drank_did_not_make_are_left_where_they_are(toy_project):
    others = ("champion", "champion@v4.1.0", "champion@newest", "champion@v7.0.0-rc.1")
    for tag in others:
        run(toy_project, "git", "tag", tag, "HEAD")
    before = run(toy_project, "git", "for-each-ref", "refs/tags").splitlines()
    promote(toy_project, "d-rank-80")
    (made,) = set(run(toy_project, "git", "for-each-ref", "refs/tags").splitlines()).difference(before)
    assert made.endswith(" tag\trefs/tags/champion@v5.0.0")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen makes the key")
def test_a_signed_tag_is_known_again_beside_a_branch_of_its_name(toy_project):
    key = toy_project.parent / "key"
    run(toy_project, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    config(("tag.gpgSign", "true"), ("gpg.format", "ssh"), ("user.signingKey", str(key)))(toy_project)
    promote(toy_project, "dense")
    run(toy_project, "git", "branch", "champion@v1.0.0")
    before = run(toy_project, "git", "for-each-ref", "refs/tags")
    assert "BEGIN SSH SIGNATURE" in run(toy_project, "git", "cat-file", "tag", "refs/tags/champion@v1.0.0")
    promote(toy_project, "dense")
    assert run(toy_project, "git", "for-each-ref", "refs/tags") == before


def test_what_ends_between_the_two_moves_is_undone(toy_project, monkeypatch):
    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("drank.tracking.set_champion", ends)
        with pytest.raises(KeyboardInterrupt):
            command("d-rank-80", toy_project)
    assert run(toy_project, "git", "tag") == ""
    promote(toy_project, "d-rank-80")
    assert champions(toy_project) == ("d-rank-80", "d-rank-80")


def test_what_a_kill_left_between_the_two_moves_is_finished_by_the_next_call(toy_project):
    promote(toy_project, "dense")
    promote(toy_project, "d-rank-80")
    Runs(toy_project).client.set_registered_model_alias("drank", "champion", "1")
    assert champions(toy_project) == ("dense", "d-rank-80")
    promote(toy_project, "d-rank-80")
    assert champions(toy_project) == ("d-rank-80", "d-rank-80")


def test_one_champion_on_a_real_server_that_refuses_to_move_it_and_names_that_mlflow_refuses(
    toy_project, tmp_path, monkeypatch
):
    def refuse(*_):
        raise MlflowException("503 Service Unavailable")

    (toy_project / "mlflow.db").rename(tmp_path / "mlflow.db")
    with serving(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client = MlflowClient(tracking_uri=address)
        promote(toy_project, "dense")
        assert champions(toy_project, client) == ("dense", "dense")
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "set_registered_model_alias", refuse)
            with pytest.raises(TrackingError, match="is MLFLOW_TRACKING_URI right"):
                promote(toy_project, "d-rank-80")
        assert champions(toy_project, client) == ("dense", "dense")
        promote(toy_project, "d-rank-80")
        assert champions(toy_project, client) == ("d-rank-80", "d-rank-80")
        tracked = track(toy_project)
        assert set(tracked.runs) == set(VARIANTS)
        assert {found.data.metrics["exact_match:2Cstrict-match/gsm8k"] for found in tracked.runs.values()} == {0.5}
        assert tracked.where.startswith("http://127.0.0.1:")
