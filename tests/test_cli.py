"""The command `drank`: what it runs, what it prints, how it ends; and MLproject, which calls it."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import drank
from drank.cli.pipeline import table_of_variants
from drank.planning.plan import TIMELESS
from drank.project.tolerance import DTYPE_TOLERANCE
from tests import conftest
from tests.toy import STORE, VARIANTS, Runs, executed, lock_sha256, write_project

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def command(root: Path, *arguments: str, real: bool = False) -> subprocess.CompletedProcess[str]:
    """A program of this environment; where it is ``real``, from outside: its folder is not on the path."""
    if not real:
        return conftest.run(root, *arguments, check=False, path=REPOSITORY / "src")
    program = [str(BIN / arguments[0]), *arguments[1:]]
    return subprocess.run(program, cwd=root, env=os.environ | conftest.QUIET, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of which nothing has run, with a store that has the tables alone."""
    for name in STORE:
        monkeypatch.delenv(name, raising=False)
    write_project(tmp_path / "project")
    Runs(tmp_path / "project")
    return tmp_path / "project"


def test_run_reproduces_logs_and_shows_the_variants(project, tmp_path):
    done = command(tmp_path, "drank", "run", "--root", "project", real=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluation@d-rank-80" in executed(done.stdout)
    stages = executed(done.stdout)
    told = [line for line in done.stderr.splitlines() if line.startswith(("up to", "["))]
    first = f"up to {len(stages)} stages to run ({TIMELESS}): {', '.join(stages)}"
    assert told == [first, *(f"[{i} of {len(stages)}] {name}" for i, name in enumerate(stages, 1))]
    pipeline, variants = Runs(project).one_state()
    assert (pipeline.data.tags["dvc.lock_sha256"], set(variants)) == (lock_sha256(project), set(VARIANTS))
    (row,) = (line for line in done.stdout.splitlines() if "d-rank-80" in line and "1.25" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][2:] == ["0.800", "2.0", "25.00", "1.25", "0.25 ± 0.01"]
    assert f"mlflow ui --backend-store-uri sqlite:///{project / 'mlflow.db'}" in done.stdout


def test_run_reproduces_the_targets_alone_and_a_stage_that_fails_fails_the_command(project):
    done = command(project, "drank", "run", "allocation@dense")
    assert executed(done.stdout) == ["sampling", "covariance", "allocation@dense"]
    assert done.returncode == 1
    assert "error: dvc.lock: no stage has written results/summary.csv yet; run `dvc repro`\n" in done.stderr
    (project / "step.py").write_text("raise SystemExit('the stage said why')")
    done = command(project, "drank", "run")
    assert done.returncode == 1
    assert "the stage said why" in done.stderr
    assert "error: dvc repro ended with exit status 255; nothing was logged to MLflow\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["track"], 1, "error: dvc.lock: not found; run `dvc repro`, which writes it\n"),
        (["track", "--root", "nowhere"], 2, "nowhere"),
        (["trakc"], 2, "No such command"),
    ],
)
def test_an_error_of_the_user_is_a_message_and_a_status(tmp_path, arguments, status, message):
    done = command(tmp_path, "drank", *arguments)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_commands_and_loads_nothing_heavy():
    program = (
        "import sys; sys.argv = ['drank', '--help']; from drank.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    )
    program += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"run", "track"} <= set(done.stdout.split())
    assert not {"torch", "transformers", "mlflow", "pandas", "numpy", "dvc"} & set(done.stdout.split())


HEAD = "variant,preset,kept_ratio,bytes,dtype,token_perplexity/news"
DENSE, SMALL = "plain,dense,1.0,269060552,float32,20.0", "small,d-rank,0.79999,1500000,{},35.0"


@pytest.mark.parametrize(
    ("rows", "shown", "hidden"),
    [
        ([DENSE, SMALL.format("float32")], ["269.1", "20.00", "0.800", "35.00", "1.75"], "different types"),
        ([DENSE, SMALL.format("bfloat16")], ["different types, bfloat16 and float32", f"{DTYPE_TOLERANCE:.1%}"], None),
        ([SMALL.format("float32")], ["35.00"], "×"),  # nothing to compare with
    ],
)
def test_the_table_is_that_of_the_report(tmp_path, rows, shown, hidden):
    (tmp_path / "summary.csv").write_text("\n".join([HEAD, *rows]))
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table_of_variants(tmp_path / "summary.csv"))
    text = " ".join(capture.get().split())
    assert all(words in text for words in shown)
    assert hidden is None or hidden not in text


def test_mlflow_run_changes_a_ratio_and_logs_the_new_state(project):
    for name in ("MLproject", "python_env.yaml"):
        shutil.copy(REPOSITORY / name, project)
    arguments = ("--env-manager", "local", "-e", "ratio", "-P", "size_ratio=0.6")
    done = command(project, "mlflow", "run", ".", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    pipeline, variants = Runs(project).one_state()
    assert (pipeline.data.tags["dvc.lock_sha256"], set(variants)) == (lock_sha256(project), set(VARIANTS))
    assert "0.6" in (project / "results/d-rank-80.json").read_text()


def test_it_says_its_version(project):
    assert command(project, "drank", "--version", real=True).stdout == f"drank {drank.__version__}\n"


@pytest.mark.parametrize(("typed", "offered"), [("drank diff d", {"dense", "d-rank-80"}), ("drank promote x", set())])
def test_a_shell_completes_names_of_variants(project, typed, offered):
    """As bash asks for it; names come from params.yaml, and none where that cannot be read."""
    environment = {"_DRANK_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": "2"}
    told = {"env": os.environ | conftest.QUIET | environment, "capture_output": True, "text": True}
    ask = partial(subprocess.run, [str(BIN / "drank")], cwd=project, **told)
    assert set(ask().stdout.split()) == offered
    (project / "params.yaml").write_text("variants: [")
    assert ask().stdout.split() == []
