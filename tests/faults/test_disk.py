"""Too little disk, forbidden files and closed streams, a few times each (see ``disk``, which does it often)."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import conftest
from tests.faults.disk import VARIANT, Disk, free_pages, small_disk

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def disk(reproduced, tmp_path_factory):
    try:
        with small_disk(reproduced, tmp_path_factory.mktemp("disk")) as root:
            yield Disk(root, seed=0)
    except PermissionError as error:
        pytest.skip(f"a small file system must be mounted: {error}")


@pytest.mark.parametrize("name", ["raw", "sampling", "spectrum", "allocation", "compression", "release", "diff"])
def test_a_full_disk_is_named_and_leaves_what_was_there(disk, name):
    disk.full(name)


def test_a_store_that_did_not_fit_is_made_when_there_is_space(disk):
    """MLflow makes its tables in many steps, and cannot go on with some of them."""
    with free_pages(disk.root, 120):
        done = conftest.run(disk.root, "drank", "track", check=False, real=True)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "mlflow.db" in done.stderr
    assert "the disk is full" in done.stderr
    assert not (disk.root / "mlflow.db").exists()
    assert VARIANT in conftest.run(disk.root, "drank", "track").stdout


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [
        ("> /dev/full", 1, "error: standard output: No space left on device"),
        ("2>&- <&-", 0, ""),
        ("| head -1; exit ${PIPESTATUS[0]}", 1, ""),
    ],
)
def test_output_that_cannot_be_delivered_is_no_success_and_no_traceback(project, redirected, status, said):
    command = f"{sys.executable} -c 'from drank.cli import app; app()' diff {VARIANT} d-rank-80 {redirected}"
    done = subprocess.run(["bash", "-c", command], cwd=project, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.strip().startswith(said)
    assert said or not done.stderr


@pytest.mark.skipif(not shutil.which("setpriv") or os.getuid() != 0, reason="root gives up its privilege by setpriv")
@pytest.mark.parametrize(
    ("forbidden", "named"),
    [("data/spectrum/kfac/summary.json", "summary.json"), ("data/allocation", VARIANT)],
)
def test_what_is_forbidden_is_named(project, forbidden, named):
    path = project / forbidden
    mode = path.stat().st_mode
    path.chmod(0o555 if path.is_dir() else 0)
    plain = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
    try:
        done = conftest.run(project, *plain, sys.executable, "-m", "stages.allocation", VARIANT, check=False)
    finally:
        path.chmod(mode)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert "permission denied" in done.stderr
