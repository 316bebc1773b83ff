"""Stages as two real processes under torchrun and gloo: the same results, and one message when a process fails."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from stages.allocation import main as allocation
from stages.compression import main as compression
from stages.covariance import main as covariance
from stages.evaluation import main as evaluation
from stages.raw import main as raw
from stages.sampling import main as sampling
from stages.spectrum import main as spectrum

from drank.project.files import read_json, read_tensors, write_tensors
from drank.project.processes import Group, launched
from tests import conftest, tiny
from tests.conftest import REPOSITORY
from tests.faults.kill import alive, stages_of


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A project whose stages one process ran."""
    root = tmp_path_factory.mktemp("alone")
    tiny.project(root)
    set_params(root, "covariance", fisher="gaussian", batch_windows=2)
    set_params(root, "spectrum", input={"calibration_seed": 0, "metric": "input", "units": "matrix"} | SENSITIVITY)
    raw(root)
    sampling(root)
    covariance("0", root)
    for key in ("input", "kfac"):
        spectrum(key, root)
    allocation("kfac-80", root)
    compression("kfac-80", root)
    evaluation("kfac-80", root)
    return root


SENSITIVITY = {"sensitivity_windows": 2, "sensitivity_ratios": [0.5]}


@pytest.fixture
def project(alone, tmp_path):
    """A copy of it, for two processes."""
    root = shutil.copytree(alone, tmp_path / "project")
    set_params(root, "covariance", processes=2)
    set_params(root, "evaluation", processes=2)
    return root


def set_params(root, section, **values):
    document = yaml.safe_load((root / "params.yaml").read_text())
    document[section] |= values
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def start(root, stage, *arguments):
    command = [sys.executable, "-m", f"stages.{stage}", *arguments, "--root", str(root)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(root, stage, *arguments):
    command = (sys.executable, "-m", f"stages.{stage}", *arguments, "--root", str(root))
    done = conftest.run(REPOSITORY, *command, check=False)
    return done.returncode, done.stderr


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("offload", [False, True])
def test_covariances_of_two_processes_are_those_of_one(alone, project, offload):
    set_params(project, "covariance", offload=offload)
    shutil.rmtree(project / "data/covariance/0")
    returned, errors = run(project, "covariance", "0")
    assert returned == 0, errors
    found, expected = project / "data/covariance/0", alone / "data/covariance/0"
    assert files(found).keys() == files(expected).keys()
    assert read_json(found / "summary.json") == read_json(expected / "summary.json")
    for name in files(expected):
        if name.endswith(".safetensors"):
            ours, theirs = read_tensors(found / name), read_tensors(expected / name)
            scale = theirs["covariance"].diagonal().sqrt()
            off = (ours["covariance"] - theirs["covariance"]).abs() / torch.outer(scale, scale).clamp_min(1e-30)
            assert float(off.max()) < 1e-6, name
            if "magnitude" in theirs:
                torch.testing.assert_close(ours["magnitude"], theirs["magnitude"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", ["input", "kfac"])
def test_spectra_of_two_processes_are_those_of_one_to_the_bit(alone, project, key):
    shutil.rmtree(project / "data/spectrum" / key)
    returned, errors = run(project, "spectrum", key)
    assert returned == 0, errors
    assert files(project / "data/spectrum" / key) == files(alone / "data/spectrum" / key)


def test_figures_of_two_processes_are_those_of_one(alone, project):
    result = project / "results/kfac-80.json"
    result.unlink()
    returned, errors = run(project, "evaluation", "kfac-80")
    assert returned == 0, errors
    expected = read_json(alone / "results/kfac-80.json")
    others = {key: value for key, value in read_json(result).items() if not isinstance(value, float)}
    assert others == {key: value for key, value in expected.items() if not isinstance(value, float)}
    numbers = {key: value for key, value in expected.items() if isinstance(value, float)}
    assert {key: read_json(result)[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)


def test_fewer_items_than_processes_are_refused(project):
    file = project / "data/sampling/tasks/last_word.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    returned, errors = run(project, "evaluation", "kfac-80")
    assert returned == 1
    assert "error: evaluation.processes = 2, but task last_word has 1 items" in errors


def test_a_mistake_that_one_or_all_processes_meet_is_one_message(project):
    """Units are dealt out by size, so that one process alone meets the damaged file."""
    damaged = project / "data/covariance/0/gradients/model.layers.1.self_attn.v_proj.safetensors"
    damaged.write_bytes(b"x")
    before = files(project / "data")
    returned, errors = run(project, "spectrum", "kfac")
    assert returned == 1
    assert [line for line in errors.splitlines() if "error" in line.lower()] == [errors.strip().splitlines()[-1]]
    assert f"error: {damaged}: damaged, not safetensors" in errors
    assert files(project / "data") == before
    set_params(project, "covariance", targets=["no_such_proj"])
    returned, also = run(project, "covariance", "0")
    assert returned == 1
    assert also.count("'no_such_proj' matches nothing") == 1
    assert "Traceback" not in errors + also


@pytest.mark.parametrize("victim", ["0", "launcher"])
def test_a_killed_process_ends_the_stage_and_the_others(project, victim):
    """While a covariance that would take a minute is in the middle."""
    before, windows = files(project / "data/covariance"), project / "data/sampling/calibration/0.safetensors"
    write_tensors(windows, {"windows": read_tensors(windows)["windows"].repeat(500, 1)})
    launcher = start(project, "covariance", "0")
    while not any((project / "data/covariance/.0.partial").glob(".*-1")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)
    processes = {one.environ()["RANK"]: one for one in stages_of(psutil.Process(launcher.pid).children())}
    assert sorted(processes) == ["0", "1"]
    processes.get(victim, launcher).kill()
    _, errors = launcher.communicate(timeout=60)  # processes hold its standard error, so this waits for them too
    if victim != "launcher":
        assert launcher.returncode == 1
        assert f"error: process {victim} was ended by SIGKILL" in errors
        assert "Traceback" not in errors
    assert not alive(list(processes.values()))
    left = {name for name in files(project / "data/covariance") if not name.startswith(".0.partial")}
    assert left == set(before)


def test_one_process_is_a_group_of_its_own():
    group, total = Group(), torch.ones(2)
    group.sum(total)
    assert torch.equal(total, torch.ones(2))
    assert group.gather({"a": 1}) == [{"a": 1}]
    assert [0, 1, 2][group.share] == [0, 1, 2]
    assert [[0, 1, 2, 3, 4][Group(rank, 3).share] for rank in range(3)] == [[0, 3], [1, 4], [2]]


def test_only_the_process_that_a_person_started_starts_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []
    monkeypatch.setattr("drank.project.processes.launch", lambda n, *arguments: started.append((n, *arguments)))
    assert [launched(n, "covariance", "0", Path("here")) for n in (1, 2)] == [False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched(2, "covariance", "0", Path("here"))
    assert started == [(2, "stages.covariance", "0", "--root", "here")]
