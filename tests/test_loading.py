"""Programs that docs/loading.md names: transformers' pipeline and Trainer, and lm-eval's command line."""

import functools
import json
import math
import sys
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
