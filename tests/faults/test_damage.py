"""Every kind of file damaged a few times: DVC and the audit notice what they promise (see ``damage``).

``python -m tests.faults.damage`` does it a thousand times.
"""

import random
import shutil

import pytest

from drank.project.damage import find_damage
from tests import warm
from tests.conftest import run
from tests.faults.damage import KEPT, MODEL, Damager, damaged, dvc_names, holding

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
    seen = damager.fault(kind, at_rest=False, use_it=False)
    assert (seen.dvc, seen.audit) == (True, True), seen


@pytest.mark.parametrize("kind", [kind for kind in KEPT if kind not in ("lock", *READ_BY_OTHERS, *UNCHECKED)])
def test_damage_at_rest_is_refused_by_name_when_it_is_next_read(damager, kind, monkeypatch):
    """A bit that flips on the disk leaves size and time of change, and these are what DVC knows a file by."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    seen = damager.fault(kind, at_rest=True, ask_dvc=False, ask_audit=False)
    assert seen.use == "named", seen


@pytest.mark.parametrize("kind", [*READ_BY_OTHERS, *UNCHECKED])
def test_damage_at_rest_that_no_stage_looks_for_is_seen_by_the_audit(damager, kind):
    """In a released folder, and in what it was sliced from."""
    seen = damager.fault(kind, at_rest=True, ask_dvc=False, use_it=False)
    assert seen.audit, seen


@pytest.mark.parametrize("kind", UNCHECKED)
def test_damage_at_rest_that_no_stage_looks_for_is_seen_by_check(damager, kind):
    file = sorted(damager.watched.glob(KEPT[kind].pattern))[0]
    with holding(file, flipped(file), at_rest=True):
        assert [damage.path for damage in find_damage(damager.watched).damages] == [file]


def test_a_damaged_lock_is_refused_or_changes_no_figure(damager):
    """Nobody reads the sizes in it, and a variant has only the stages that it came through."""
    for _ in range(6):
        seen = damager.fault("lock", at_rest=False, ask_dvc=False)
        assert seen.use in ("named", "same"), seen


def test_repro_puts_every_damaged_output_back(reproduced, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(reproduced, root, symlinks=True)
    draw, before = random.Random(1), {}
    for kind in FILES:
        file = draw.choice(sorted(file for file in root.glob(KEPT[kind].pattern) if file.is_file()))
        before.setdefault(file, file.read_bytes())
        file.write_bytes(damaged(before[file], draw)[1])
    executed = run(root, "dvc", "repro").stdout
    assert [file for file, content in before.items() if file.read_bytes() != content] == []
    assert (root / "dvc.lock").read_bytes() == (reproduced / "dvc.lock").read_bytes()
    assert run(root, "dvc", "status").stdout.strip() == "Data and pipelines are up to date.", executed


def test_what_dvc_trusts_is_told_as_it_is(damager):
    """The limit for which stages compare what they read, so that whoever lifts it hears of it."""
    file = damager.watched / MODEL / "model.safetensors"
    for at_rest in (True, False):
        with holding(file, flipped(file), at_rest):
            assert dvc_names(damager.watched, file.name) is not at_rest


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    return bytes(content)
