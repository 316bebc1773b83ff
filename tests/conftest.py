import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # which stages set when they are imported
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # which benchmarks set when they are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several would wait for each other, and a fork for all of them

import pytest
import torch
import wrapt
from filelock import FileLock
from hypothesis import settings

from tests import tiny, warm

# The same examples on every run and no time limit, so that a red test is red for everyone, on a busy machine too.
# HYPOTHESIS_PROFILE=default searches new examples.
settings.register_profile("drank", derandomize=True, deadline=None, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "drank"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


REPOSITORY = Path(__file__).parent.parent
PROGRAMS = "DRANK_TESTS_PROGRAMS"  # the folder of programs that start at once, for this process and pytest-xdist's
QUIET = {"OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def pytest_configure(config):
    if PROGRAMS not in os.environ:
        cleanup = ExitStack()
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="drank-")))
        os.environ[PROGRAMS] = str(cleanup.enter_context(warm.programs(folder, os.environ | QUIET)))
        cleanup.callback(os.environ.pop, PROGRAMS)
        config.add_cleanup(cleanup.close)
    database = Path(os.environ[PROGRAMS]) / "mlflow.db"
    wrapt.register_post_import_hook(lambda _: warm.copy_databases(database), "mlflow.store.db.utils")


# Files that take long. Two of the first three need no ``reproduced`` project, which one process makes for both
# meanwhile.
LONG = (
    "test_kill", "test_sources", "test_processes", "test_bench", "test_audit", "test_promote", "test_pages",
    "test_two_at_once", "test_pipeline", "test_cli", "test_documents", "test_tracking", "test_determinism",
    "test_precision", "test_recorded", "test_loading", "test_healing", "test_remote", "test_plan", "test_gpu",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Long files first, so that no process is left with one when the others are done."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def run(root, *command, check=True, real=False, path=None):
    """A command in a project, with this Python's programs first and the project's own package.

    Stages, DVC and drank are forks of a process that has imported them (see ``tests.warm``), unless they are to be
    ``real``.
    """
    environment = os.environ | QUIET | {"PYTHONPATH": str(path or root)}
    programs = [str(Path(sys.executable).parent)]
    if not real and PROGRAMS in environment:
        programs.insert(0, environment[PROGRAMS])
        if command[0] == sys.executable:
            command = (f"{programs[0]}/python", *command[1:])
    environment["PATH"] = os.pathsep.join([*programs, environment["PATH"]])
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory):
    """A clone in small: our dvc.yaml, stages and package, a tiny model and texts, all reproduced and committed once.

    Processes of pytest-xdist share it. Copy it before changing anything.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "reproduced"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            making = shared.with_name("making") / "project"
            shutil.rmtree(making.parent, ignore_errors=True)
            reproduce(making)
            making.parent.rename(shared)
    return shared / "project"


def sow(root, sources=tiny.project):
    """A clone in small, of which nothing is reproduced: our dvc.yaml, stages and package, with these sources."""
    sources(root)
    for file in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / file, root)
    for folder in ("stages", "src"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "git", "config", "user.name", "someone")
    run(root, "git", "config", "user.email", "someone@example.org")
    run(root, sys.executable, "-m", "dvc", "init", "-q")


def build(root, ship=True):
    """Every stage of a project, one after the other, in this process, without DVC; but for ``ship`` up to results."""
    from stages import allocation, compression, covariance, evaluation, raw, release, report, sampling, spectrum

    from drank.project.params import read_params

    params = read_params(root / "params.yaml")
    raw.main(root)
    sampling.main(root)
    for seed in params.sampling.calibration_seeds:
        covariance.main(str(seed), root)
    for key in params.spectrum:
        spectrum.main(key, root)
    for stage in (allocation, compression, evaluation, *([release] if ship else [])):
        for variant in params.variants:
            stage.main(variant, root)
    if ship:
        report.main(root)


def reproduce(root, sources=tiny.project):
    """The same, built and committed to DVC, which then has nothing to do, and to git."""
    sow(root, sources)
    build(root)
    run(root, sys.executable, "-m", "dvc", "commit", "--force")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-q", "-m", "Everything reproduced")


@pytest.fixture(scope="module")
def project(reproduced, tmp_path_factory):
    """A copy of the reproduced project for one test module."""
    root = tmp_path_factory.mktemp("module") / "project"
    shutil.copytree(reproduced, root, symlinks=True)
    return root


@pytest.fixture(scope="session")
def toy_made(tmp_path_factory):
    """The project of tests.toy, reproduced and committed, with an empty store. Copy it before changing anything."""
    from tests import toy

    return toy.made(tmp_path_factory.mktemp("toy") / "project")


@pytest.fixture
def toy_project(toy_made, tmp_path, monkeypatch):
    """A copy for one test, and no other store in the environment."""
    from tests import toy

    for name in toy.STORE:
        monkeypatch.delenv(name, raising=False)
    return toy.copied(toy_made, tmp_path)
