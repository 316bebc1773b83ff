"""How a stage starts and ends, and the first of them, raw, as a command line."""

import errno
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drank.project.command import run_stage
from drank.project.files import FileError

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def command_line(monkeypatch):
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # run_stage sets what is not set, and would leave it set for other tests
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["stage", *arguments])


def test_an_error_of_the_user_is_one_message_and_exit_status_1(command_line, capsys):
    def main() -> None:
        raise FileError("params.yaml: what was wrong, and the fix")

    command_line()
    with pytest.raises(SystemExit) as end:
        run_stage(main)
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: params.yaml: what was wrong, and the fix\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), UnicodeEncodeError("ascii", "ä", 0, 1, "no"), KeyError("k")])
def test_a_bug_keeps_its_traceback(command_line, error):
    def main() -> None:
        raise error

    command_line()
    with pytest.raises(type(error)):
        run_stage(main)


def test_what_the_system_refuses_is_one_message_too(command_line, capsys):
    def main() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "params.yaml")

    command_line()
    with pytest.raises(SystemExit) as end:
        run_stage(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: params.yaml: permission denied; ")


def test_arguments_reach_the_stage_and_a_good_end_has_exit_status_0(command_line):
    seen = []

    def main(variant: str, root: Path = Path()) -> None:
        seen.append((variant, root))

    command_line("d-rank-80", "--root", "elsewhere")
    with pytest.raises(SystemExit) as end:
        run_stage(main)
    assert end.value.code == 0
    assert seen == [("d-rank-80", Path("elsewhere"))]


def write_params(root: Path, model: str) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["model"] = {"source": model}
    params["text"] = {name: {"source": f"local:{name}.txt"} for name in params["text"]}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for name in params["text"]:
        (root / f"{name}.txt").write_text(f"{name} one\n\n{name} two\n")


def write_model(folder: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=8,
        )
    ).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "news": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def run_raw(command_line, root: Path) -> int:
    command_line("--root", str(root))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "stages" / "raw.py"), run_name="__main__")
    return end.value.code


def test_raw_writes_the_model_and_every_text(tmp_path, command_line):
    write_params(tmp_path, "local:model")
    write_model(tmp_path / "model")
    assert run_raw(command_line, tmp_path) == 0
    texts = {path.name: path.read_text() for path in (tmp_path / "data/raw/text").iterdir()}
    assert set(texts) == {"news.jsonl", "commons.jsonl"}
    assert [json.loads(line)["text"] for line in texts["news.jsonl"].splitlines()] == ["news one", "news two"]
    weights = load_file(tmp_path / "data/raw/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_raw_drops_a_text_that_params_no_longer_name(tmp_path, command_line):
    write_params(tmp_path, "local:model")
    write_model(tmp_path / "model")
    (tmp_path / "data/raw/text").mkdir(parents=True)
    (tmp_path / "data/raw/text/removed.jsonl").write_text("")
    assert run_raw(command_line, tmp_path) == 0
    assert sorted(path.name for path in (tmp_path / "data/raw/text").iterdir()) == [
        "commons.jsonl",
        "news.jsonl",
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [("local:nowhere", "error: local:nowhere: not found"), ("ftp://x", "'model.source' = 'ftp://x'")],
)
def test_raw_says_what_is_wrong_with_a_source(tmp_path, command_line, capsys, model, message):
    write_params(tmp_path, model)
    assert run_raw(command_line, tmp_path) == 1
    assert message in capsys.readouterr().err
