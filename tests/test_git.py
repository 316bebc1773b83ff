"""Git's answers: "there is none" is one, "git cannot say" is an error."""

import os
import subprocess

import pytest

from drank.project.git import GitError, file_at, find_commits, has_history, head, keeps, resolve


def git(root, *arguments):
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "One")
    return tmp_path


def test_answers(repository):
    commit, dirty = head(repository)
    assert (has_history(repository), dirty, resolve(repository, "HEAD")) == (True, False, commit)
    assert (file_at(repository, "HEAD", "file"), file_at(repository, "HEAD", "gone")) == (b"1\n", None)
    assert (resolve(repository, "gone"), file_at(repository, "gone", "file")) == (None, None)
    (repository / "file").write_text("2\n")
    assert head(repository) == (commit, True)
    assert keeps(repository, repository / "file")
    assert [found.subject for found in find_commits(repository, "1", "file")] == ["One"]


def test_no_repository_and_no_commit_are_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert (has_history(tmp_path / "folder"), head(tmp_path / "folder")) == (False, None)
    git(tmp_path, "init", "-q")
    assert (has_history(tmp_path), head(tmp_path)) == (False, (None, False))


@pytest.mark.parametrize(
    "ask", [has_history, head, lambda root: file_at(root, "HEAD", "file"), lambda root: keeps(root, root / "file")]
)
@pytest.mark.parametrize("fault", ["owner", "PATH", "HEAD"])
def test_a_repository_that_git_does_not_read_is_an_error(repository, monkeypatch, ask, fault):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    if fault == "owner":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    elif fault == "PATH":
        monkeypatch.setenv("PATH", str(repository))
    else:
        (repository / ".git/HEAD").unlink()
    with pytest.raises(
        GitError, match={"owner": "safe.directory", "PATH": "not installed"}.get(fault, "not a git repo")
    ):
        ask(repository)


def test_git_that_is_not_installed_is_no_error_where_it_has_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_history(tmp_path)
