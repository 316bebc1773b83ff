"""SIGKILL a few times (see ``kill``): what comes out in the end is what an undisturbed run makes.

``python -m tests.faults.kill --n 100`` does it over all stages.
"""

import shutil
import sys
from functools import partial

import pytest
import yaml

from tests.faults.campaign import Counts, contents
from tests.faults.kill import Repro, Track

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.skipif(sys.platform == "win32", reason="sessions and SIGKILL are POSIX"),
]


@pytest.fixture
def counts():
    return Counts()


@pytest.fixture
def copy(reproduced):
    return partial(shutil.copytree, reproduced, symlinks=True, ignore=shutil.ignore_patterns("runs"))


def forget(root, copy, n_stages):
    """A copy in which the last stages were not run, and made nothing."""
    copy(root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    for stage in list(lock["stages"])[-n_stages:]:
        for out in lock["stages"].pop(stage)["outs"]:
            path = root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def test_a_killed_repro_ends_with_the_bytes_of_an_undisturbed_one(copy, reproduced, tmp_path, counts):
    copy = partial(forget, copy=copy, n_stages=2)
    repro = Repro(
        copy, tmp_path, counts, seed=1983
    )  # kills DVC 1.1 seconds after a stage began, whose orphan ends itself
    repro.expected, repro.ways = contents(reproduced), ("first",)
    repro.clone(n_kills=1)
    assert counts.told == []
    assert repro.n_kills > 0


def test_a_killed_track_leaves_one_whole_run_a_variant(copy, tmp_path, counts):
    track = Track(copy, tmp_path, counts)
    track.seconds = 1.0  # less than making its database takes
    track.clone(n_kills=1)
    assert counts.told == []
    assert track.n_kills == 1
