"""A colleague's clone with a DVC remote: everything is fetched, nothing is computed, and audits hold in every link."""

import shutil
import sys

import pytest

from drank.audit import audit
from tests.conftest import run
from tests.test_pipeline import digests, repro, set_ratio


@pytest.fixture(scope="module")
def shared(project, tmp_path_factory):
    """A project that has pushed its artefacts and its run cache to a folder."""
    run(project, sys.executable, "-m", "dvc", "remote", "add", "-d", "store", str(tmp_path_factory.mktemp("store")))
    run(project, "git", "commit", "-q", "-a", "-m", "A remote")
    run(project, sys.executable, "-m", "dvc", "push", "-q", "--run-cache")
    return project


@pytest.fixture
def colleague(shared, tmp_path):
    root = tmp_path / "colleague"
    run(shared, "git", "clone", "-q", str(shared), str(root))
    shutil.copytree(shared / "source", root / "source", dirs_exist_ok=True)
    return root


def test_a_clone_pulls_everything_and_computes_only_what_nobody_has(shared, colleague):
    run(colleague, sys.executable, "-m", "dvc", "pull", "-q", "--run-cache")
    assert repro(colleague) == []
    assert digests(colleague) == digests(shared)
    found = audit(colleague / "data/models/kfac-80", colleague)
    assert {link.name for link in found.links if link.finding != "holds"} == {"MLflow"}
    set_ratio(colleague, "d-rank-80", 0.7)
    steps = ("allocation", "compression", "evaluation", "release")
    assert sorted(repro(colleague)) == sorted([*(f"{step}@d-rank-80" for step in steps), "report"])


def test_one_model_is_fetched_alone_and_audited(shared, colleague):
    run(colleague, sys.executable, "-m", "dvc", "pull", "-q", "data/models/kfac-80")
    assert not (colleague / "data/spectrum/kfac").exists()
    folder = colleague / "data/models/kfac-80"
    states = {link.name: link.finding for link in audit(folder, colleague).links}
    assert states["dvc.lock"] == states["files"] == "holds"
    assert states["loss"] == "cannot be checked here"
