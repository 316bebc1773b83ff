"""The programs that start at once are, from outside, the real ones."""

import importlib
import os
import subprocess
import sys

import psutil
import pytest

from tests.conftest import PROGRAMS, QUIET, run


@pytest.fixture
def folder(tmp_path):
    """A folder with a stage that says what it sees, and ends as it is told."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text("")
    (tmp_path / "stages/seen.py").write_text(
        "import os, sys\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], os.getcwd(), os.environ.get('COLOUR'), 'torch' in sys.modules, sys.stdin.read())\n"
        "    print('a warning', file=sys.stderr)\n"
        "    exec(sys.argv[1])\n"
    )
    return tmp_path


def started(folder, *command, typed="", **variables):
    environment = os.environ | QUIET | {"PYTHONPATH": str(folder)} | variables
    return subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('why')", 1),
        ("sys.exit()", 0),
        ("1 / 0", 1),
        ("import atexit; atexit.register(print, 'last words')", 0),
        ("import threading, time; threading.Timer(0.1, print, ['last words']).start()", 0),
    ],
)
def test_arguments_streams_variables_folder_and_status_are_those_of_the_real_program(folder, end, status):
    command = ("-m", "stages.seen", end, "b c")
    real = started(folder, sys.executable, *command, typed="typed", COLOUR="red")
    fork = started(folder, f"{os.environ[PROGRAMS]}/python", *command, typed="typed", COLOUR="red")
    assert (real.returncode, fork.returncode) == (status, status)
    assert fork.stdout == real.stdout.replace(" False typed", " True typed")
    assert " False typed" in real.stdout
    assert fork.stderr.startswith("a warning\n")
    assert fork.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


@pytest.mark.parametrize("variables", [{"PYTHONHASHSEED": "1"}, {"HF_HUB_OFFLINE": "0"}, {"LC_ALL": "C"}])
def test_variables_that_are_read_before_the_first_line_get_a_real_program(folder, variables):
    done = started(folder, f"{os.environ[PROGRAMS]}/python", "-m", "stages.seen", "pass", **variables)
    assert " False " in done.stdout


def test_what_these_tests_import_leaves_no_such_variables(folder):
    importlib.import_module("lm_eval.evaluator")
    importlib.import_module("stages.evaluation")
    assert " True " in run(folder, sys.executable, "-m", "stages.seen", "pass").stdout


def test_what_ends_by_a_signal_says_so(folder):
    done = started(folder, f"{os.environ[PROGRAMS]}/python", "-m", "stages.seen", "os.kill(os.getpid(), 9)")
    assert done.returncode == 128 + 9


def test_it_is_killed_with_the_program_that_stands_for_it(folder):
    said = "print(os.getpid(), flush=True); import time; time.sleep(600)"
    command = [f"{os.environ[PROGRAMS]}/python", "-m", "stages.seen", said]
    environment = os.environ | QUIET
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as fork:
        fork.stdout.readline()
        assert psutil.pid_exists(int(fork.stdout.readline()))
        fork.kill()
        assert fork.stdout.read() == b""  # the fork holds it until it ends


def test_what_it_starts_by_this_python_starts_at_once_too(folder):
    again = "import subprocess; subprocess.run([sys.executable, '-m', 'stages.seen', 'pass'], check=True)"
    done = started(folder, f"{os.environ[PROGRAMS]}/python", "-m", "stages.seen", again)
    assert done.stdout.count(" True ") == 2


def test_any_other_program_is_the_real_one(tmp_path):
    done = run(tmp_path, sys.executable, "-c", "import sys; print('torch' in sys.modules, sys.executable)")
    assert done.stdout.split() == ["False", sys.executable]
