"""How a stage starts and ends, and the first of them, raw, as a command line."""

import errno
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drank.project.command import run_stage
from drank.project.files import FileError
from tests import tiny
from tests.conftest import run

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def command_line(monkeypatch):
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # run_stage sets what is not set, and would leave it set for other tests
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["stage", *arguments])


def raising(error):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileError("params.yaml: what was wrong, and the fix"), "error: params.yaml: what was wrong, and the fix\n"),
        (PermissionError(errno.EACCES, "Permission denied", "params.yaml"), "error: params.yaml: permission denied; "),
    ],
)
def test_an_error_of_the_user_is_one_message_and_exit_status_1(command_line, capsys, error, message):
    command_line()
    with pytest.raises(SystemExit) as end:
        run_stage(raising(error))
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("error", [ValueError("a bug"), UnicodeEncodeError("ascii", "ä", 0, 1, "no"), KeyError("k")])
def test_a_bug_keeps_its_traceback(command_line, error):
    command_line()
    with pytest.raises(type(error)):
        run_stage(raising(error))


def test_arguments_reach_the_stage_and_a_good_end_has_exit_status_0(command_line):
    seen = []

    def main(variant: str, root: Path = Path()) -> None:
        seen.append((variant, root))

    command_line("d-rank-80", "--root", "elsewhere")
    with pytest.raises(SystemExit) as end:
        run_stage(main)
    assert end.value.code == 0
    assert seen == [("d-rank-80", Path("elsewhere"))]


def test_raw_writes_the_model_and_every_text_and_drops_another(tmp_path, command_line):
    tiny.project(tmp_path)
    texts = tmp_path / "data/raw/text"
    texts.mkdir(parents=True)
    (texts / "removed.jsonl").write_text("")
    command_line("--root", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "stages" / "raw.py"), run_name="__main__")
    assert end.value.code == 0
    assert sorted(path.name for path in texts.iterdir()) == ["commons.jsonl", "news.jsonl"]
    documents = [json.loads(line)["text"] for line in (texts / "news.jsonl").read_text().splitlines()]
    assert documents == tiny.documents(120, 1)
    weights = load_file(tmp_path / "data/raw/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_stages_that_may_have_no_weights_to_compute_start_without_torch():
    """It takes seconds; a dense variant is compressed by links alone."""
    code = "import sys, stages.allocation, stages.compression, stages.release; print('torch' in sys.modules)"
    assert run(REPOSITORY, sys.executable, "-c", code, real=True).stdout.strip() == "False"
