"""SIGKILL a few times, in every way (see ``kill``): what comes out in the end is what an undisturbed run makes.

``python -m tests.faults.kill --n 100`` does it over all stages.
"""

import random
import shutil
import sys

import pytest

from tests.faults.kill import Counts, Pipeline, Tracking, kill_fetch

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.skipif(sys.platform == "win32", reason="sessions and SIGKILL are POSIX"),
]


@pytest.fixture
def counts():
    return Counts()


def test_a_killed_repro_ends_with_the_bytes_of_an_undisturbed_one(reproduced, tmp_path, counts):
    pipeline = Pipeline(reproduced, tmp_path, random.Random(0), counts)
    killed = pipeline.clone(n_kills=3, n_stages=2)
    assert counts.told == []
    assert killed == sum(counts.kills.values()) > 0


def test_a_killed_track_leaves_one_whole_run_a_variant(reproduced, tmp_path, counts):
    root = tmp_path / "project"
    shutil.copytree(reproduced, root, symlinks=True)
    tracking = Tracking(random.Random(0), counts)
    tracking.seconds = 4.0  # less than importing MLflow and making its database take
    tracking.kill(root, n_kills=1)
    assert counts.told == []
    assert counts.kills["track", "all"] == 1


def test_a_killed_download_is_taken_up_again(tmp_path, counts):
    kill_fetch("tiny", tmp_path, random.Random(0), counts, n=1)
    assert counts.told == []
    assert sum(counts.kills.values()) == 1
