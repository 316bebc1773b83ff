"""Every kind of file damaged a few times: DVC and the audit notice what they promise (see ``damage``).

``python -m tests.faults.damage`` does it a thousand times.
"""

import random
import shutil

import pytest

from drank.project.damage import find_damage
from tests import warm
from tests.conftest import run
from tests.faults.damage import KEPT, Damager, damaged, holding

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def damager(reproduced, tmp_path_factory):
    warm.quick_locks()
    return Damager(reproduced, tmp_path_factory.mktemp("damage"), seed=0)


FILES = [kind for kind in KEPT if kind not in ("lock", "wheels", "cache")]
READ_BY_OTHERS = ("weights", "config", "documents")  # a released folder, by from_pretrained
UNCHECKED = ("covariances", "factors")  # by stages that hashing would slow down by more than a twentieth


@pytest.mark.parametrize("kind", FILES)
def test_written_damage_is_seen_by_dvc_and_by_the_audit(damager, kind):
    assert damager.fault(kind, at_rest=False, asked=("DVC", "audit")) == {"DVC", "audit"}


@pytest.mark.parametrize("kind", [kind for kind in KEPT if kind != "lock"])
def test_damage_at_rest_is_refused_by_name_when_it_is_next_read_or_seen_by_the_audit(damager, kind, monkeypatch):
    """A bit that flips on the disk leaves size and time of change, and these are what DVC knows a file by.

    Some files no stage looks into: those of a released folder, and those that it was sliced from.
    """
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if kind in (*READ_BY_OTHERS, *UNCHECKED):
        assert damager.fault(kind, at_rest=True, asked=("audit",)) == {"audit"}
    else:
        assert damager.fault(kind, at_rest=True, asked=("use",)) == {"named"}


@pytest.mark.parametrize("kind", UNCHECKED)
def test_damage_at_rest_that_no_stage_looks_for_is_seen_by_check(damager, kind):
    file = sorted(damager.watched.glob(KEPT[kind].pattern))[0]
    with holding(file, b"other bytes", at_rest=True):
        assert [damage.path for damage in find_damage(damager.watched).damages] == [file]


def test_a_damaged_lock_is_refused_or_changes_no_figure(damager):
    """Nobody reads the sizes in it, and a variant has only the stages that it came through."""
    for _ in range(6):
        assert damager.fault("lock", at_rest=False, asked=("use",)) <= {"named", "same"}


def test_repro_puts_every_damaged_output_back(reproduced, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(reproduced, root, symlinks=True)
    draw, before = random.Random(1), {}
    for kind in FILES:
        file = draw.choice(sorted(file for file in root.glob(KEPT[kind].pattern) if file.is_file()))
        before.setdefault(file, file.read_bytes())
        file.write_bytes(damaged(before[file], draw))
    executed = run(root, "dvc", "repro").stdout
    assert [file for file, content in before.items() if file.read_bytes() != content] == []
    assert (root / "dvc.lock").read_bytes() == (reproduced / "dvc.lock").read_bytes()
    assert run(root, "dvc", "status").stdout.strip() == "Data and pipelines are up to date.", executed
