import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from hypothesis import settings

from tests import tiny

# The same examples on every run and no time limit, so that a red test is red for everyone, on a busy machine too.
# HYPOTHESIS_PROFILE=default searches new examples.
settings.register_profile("drank", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "drank"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


REPOSITORY = Path(__file__).parent.parent


def run(root, *command, check=True):
    """A command in a project, with this Python's programs first and the project's own package."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "DVC_NO_ANALYTICS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def reproduced(tmp_path_factory):
    """A clone in small: our dvc.yaml, stages and package, a tiny model and texts, all reproduced and committed once.

    Copy it before changing anything.
    """
    root = tmp_path_factory.mktemp("reproduced") / "project"
    reproduce(root)
    return root


def reproduce(root):
    """What the fixture is, in any folder."""
    tiny.project(root)
    for file in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(REPOSITORY / file, root)
    for folder in ("stages", "src"):
        shutil.copytree(REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(root, "git", "init", "-q", "-b", "main")
    run(root, "git", "config", "user.name", "someone")
    run(root, "git", "config", "user.email", "someone@example.org")
    run(root, sys.executable, "-m", "dvc", "init", "-q")
    run(root, sys.executable, "-m", "dvc", "repro")
    run(root, "git", "add", ".")
    run(root, "git", "commit", "-q", "-m", "Everything reproduced")


@pytest.fixture(scope="module")
def project(reproduced, tmp_path_factory):
    """A copy of the reproduced project for one test module."""
    root = tmp_path_factory.mktemp("module") / "project"
    shutil.copytree(reproduced, root, symlinks=True)
    return root
