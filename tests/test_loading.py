"""Programs that docs/loading.md names: transformers' pipeline and Trainer, and lm-eval's command line."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from drank.cli.export import export
from tests import compressed, tiny
from tests.conftest import REPOSITORY

LM_EVAL = "import drank; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
TASK = """\
task: my_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {documents}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module", params=compressed.MODELS)
def folder(request, tmp_path_factory):
    dense, specs = compressed.MODELS[request.param]
    return compressed.write(dense(), specs, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def greedy(folder, prompt, n):
    """Text and its continuation by the likeliest token, n times, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(n):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0])


def test_a_pipeline_generates(folder):
    generate = pipeline("text-generation", model=str(folder))
    (told,) = generate("Kalo min", max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert told["generated_text"] == greedy(folder, "Kalo min", 6)


def test_trainer_trains_every_factor_and_what_it_saves_is_still_compressed(folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = [tokenizer(text, truncation=True, max_length=32) for text in tiny.documents(16, 3)]
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=8, learning_rate=3e-3, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=settings, train_dataset=texts, data_collator=collator)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    unchanged = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert unchanged == {name for name in before if name.endswith(".places")}
    trainer.save_model(str(tmp_path / "trained"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert again.config.quantization_config.modules == model.config.quantization_config.modules
    ids = torch.arange(24)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_command_line_of_lm_eval_scores_a_folder_as_its_logits_do(tmp_path, monkeypatch):
    assert LM_EVAL in (REPOSITORY / "docs/loading.md").read_text()
    folder = compressed.write(tiny.llama(), compressed.LLAMA, tmp_path / "model")
    texts = [text[:120] for text in tiny.documents(3, 5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "my_text.yaml").write_text(TASK.format(documents=tmp_path / "texts.jsonl"))
    options = f"--model hf --model_args pretrained={folder} --tasks my_text --include_path {tmp_path} --device cpu"
    monkeypatch.setattr(sys, "argv", f"lm_eval {options} --output_path {tmp_path}/out".split())
    own = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # the search for all tasks takes long
    monkeypatch.setattr(TaskManager, "__init__", own)
    exec(LM_EVAL)
    (written,) = Path(tmp_path / "out").rglob("*.json")
    scored = json.loads(written.read_text())["results"]["my_text"]["bits_per_byte,none"]
    assert scored == pytest.approx(bits_per_byte(folder, texts), rel=1e-4)


def test_the_command_line_of_lm_eval_takes_a_folder_with_remote_code_as_it_is(tmp_path):
    """A process that nobody told to import drank."""
    folder = tmp_path / "model"
    export(compressed.write(tiny.llama(), compressed.LLAMA, tmp_path / "compressed"), folder, remote_code=True)
    texts = [text[:120] for text in tiny.documents(3, 5)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "my_text.yaml").write_text(TASK.format(documents=tmp_path / "texts.jsonl"))
    options = f"--model hf --model_args pretrained={folder},trust_remote_code=True --tasks {tmp_path}/my_text.yaml"
    command = [sys.executable, "-m", "lm_eval", *options.split(), "--device", "cpu", "--output_path", f"{tmp_path}/out"]
    own = {"HF_HOME": f"{tmp_path}/hf", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = Path(tmp_path / "out").rglob("*.json")
    scored = json.loads(written.read_text())["results"]["my_text"]["bits_per_byte,none"]
    assert scored == pytest.approx(bits_per_byte(folder, texts), rel=1e-4)


def test_drank_autoload_registers_the_format_when_python_starts_and_not_when_it_is_uninstalled(tmp_path):
    """Built and installed as by anybody, without an index, into an environment that sees this one's packages."""
    source = shutil.copytree(REPOSITORY / "src/autoload", tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ("--no-index", "--no-deps")
    subprocess.run([*pip, "wheel", "--no-build-isolation", *offline, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env/bin/python"
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path))
    folder = compressed.write(tiny.llama(), compressed.LLAMA, tmp_path / "model")
    load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    start = "import sys; assert 'drank' in sys.modules and not {'torch', 'transformers'} & sys.modules.keys()"

    def run(code):
        return subprocess.run([python, "-c", code], env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)

    assert "Unknown quantization type, got drank" in run(load).stderr
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    assert {file.name for file in site.glob("drank_autoload.*")} == {
        f"drank_autoload.{s}" for s in ("py", "pth", "start")
    }
    for code in (start, load):
        done = run(code)
        assert done.returncode == 0, done.stderr
    name, _, function = (site / "drank_autoload.start").read_text().strip().partition(":")  # Python 3.15 reads it so
    assert run(f"import {name}; {name}.{function}()").returncode == 0
    subprocess.run([*pip, "--python", python, "uninstall", "--yes", "drank-autoload"], check=True)
    assert not list(site.glob("drank*"))
    assert "Unknown quantization type, got drank" in run(load).stderr


@torch.no_grad()
def bits_per_byte(folder, texts):
    """-log2 p of every token, the first one after the end token, over bytes; documents fit into a window."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
        predicted = model(ids[:, :-1]).logits.log_softmax(-1)
        nats -= predicted.gather(-1, ids[:, 1:, None]).sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)
