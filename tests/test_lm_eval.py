"""Tasks as users of lm-eval write them: groups, filters, metrics of their own; tokenizers without special tokens."""

import json
import math
import re
from functools import partial

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from drank.model.saved import Saved
from drank.project.params import Evaluation
from drank.project.processes import Group
from drank.steps.evaluation import EvaluationError, evaluate, load_tasks, run_tasks
from tests.test_evaluation import LAST_WORD, NEXT_SENTENCE, byte_tokenizer, tiny_llama

WINDOWS = {"news": torch.arange(24).view(2, 12)}
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
    "doc_to_target": "label", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
OWN = """import numpy as np
def results(doc, results): return {{"acc_percent": 0.0}}
def percent(items): return {}
"""
WORD = {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{target}}"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of YAML in the place of lm-eval's own tasks."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    own = partial(TaskManager, include_path=str(folder))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: own(include_defaults=False))
    return folder


def write(folder, name, items=None, **config):
    """A task with these items, or a group."""
    if items is not None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        config = {"task": name, "test_split": "test", **data, **config}
    text = yaml.safe_dump(config, sort_keys=False)
    (folder / f"{name}.yaml").write_text(re.sub(r"'(!function \S+)'", r"\1", text))


def measured(model, tokenizer, names, items=None):
    tasks = load_tasks(items or {}, names, tokenizer)
    return run_tasks(model, tokenizer, tasks, 2), tasks.missing


@pytest.fixture
def group(folder):
    """capitals and rivers, which make a world; a world and more, without figures of its own."""
    write(folder, "capitals", NEXT_SENTENCE, **CHOICE)
    write(folder, "rivers", NEXT_SENTENCE[:2], **CHOICE)
    write(folder, "world", group="world", task=["capitals", "rivers"], aggregate_metric_list=ACCURACY)
    write(folder, "seas", NEXT_SENTENCE[2:], **CHOICE)
    write(folder, "more", group="more", task=["world", "seas"])
    write(folder, "most", group="most", task=["more"], aggregate_metric_list=ACCURACY)


@pytest.mark.parametrize(
    ("asked", "with_accuracy", "leaves"),
    [
        (["world"], ["world"], {"capitals": 4, "rivers": 2}),
        (["more"], ["world"], {"capitals": 4, "rivers": 2, "seas": 2}),
        (["most", "rivers"], ["world", "most"], {"capitals": 4, "rivers": 2, "seas": 2}),  # one of them twice
    ],
)
def test_groups_nested_or_without_figures_of_their_own(group, tokenizer, asked, with_accuracy, leaves):
    figures, missing = measured(tiny_llama(max_position_embeddings=64), tokenizer, asked)
    accuracies = {name: figures[f"acc/{name}"] for name in leaves}
    weighted = sum(accuracies[name] * n for name, n in (("capitals", 4), ("rivers", 2))) / 6
    assert figures["acc/world"] == pytest.approx(weighted)
    assert set(figures) == {f"acc/{name}" for name in (*leaves, *with_accuracy)} | {f"acc_stderr/{n}" for n in leaves}
    assert missing == {}


def test_named_filters_keep_their_names(folder, tokenizer):
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict-match", "flexible, extract")]
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    config = WORD | {"output_type": "generate_until", "filter_list": filters, "metric_list": metrics}
    config["generation_kwargs"] = {"until": ["x"], "max_gen_toks": 2}
    write(folder, "sums", [{"context": "1+1=", "target": "2"}], **config)
    figures, missing = measured(tiny_llama(), tokenizer, ["sums"])
    assert set(figures) == {"exact_match,strict-match/sums", "exact_match,flexible, extract/sums"}
    assert missing == {}


@pytest.mark.parametrize(
    ("value", "figures", "missing"),
    [
        ("62.5", {"acc_percent/own": 62.5}, {}),  # more than 1, of which no standard error is
        ("np.float32(0.5)", {"acc_percent/own": 0.5, "acc_percent_stderr/own": math.sqrt(0.25 / 4)}, {}),
        ("float('nan')", {}, {"acc_percent/own": "lm-eval gives nan"}),
        ("{'precision': 1.0}", {}, {"acc_percent/own": "lm-eval gives {'precision': 1.0}"}),
        ("None", {}, {"acc_percent/own": "lm-eval gives None"}),
        ("1 / 0", {}, {"acc_percent/own": "lm-eval gives nan"}),
    ],
)
def test_metrics_of_any_shape_are_read_or_told(folder, tokenizer, value, figures, missing):
    (folder / "own.py").write_text(OWN.format(value))
    metric = {"metric": "acc_percent", "aggregation": "!function own.percent", "higher_is_better": True}
    write(
        folder, "own", NEXT_SENTENCE, **CHOICE | {"metric_list": [metric], "process_results": "!function own.results"}
    )
    assert measured(tiny_llama(max_position_embeddings=64), tokenizer, ["own"]) == (figures, missing)
    assert measured(tiny_llama(), tokenizer, []) == ({}, {})


def test_the_perplexity_of_a_word_may_be_beyond_all_numbers(tokenizer):
    """In a text without spaces, a paragraph is a word."""
    items = {"news_rolling": [{"text": "長江是亞洲第一長河" * 20}]}
    figures, missing = measured(tiny_llama(), tokenizer, ["news_rolling"], items)
    assert figures["bits_per_byte/news"] > 0
    assert missing == {"word_perplexity/news": "lm-eval gives inf"}


def asked(*tasks):
    return Evaluation(batch_windows=2, threads=1, tasks=tasks)


def test_without_begin_and_end_tokens_all_is_measured_that_needs_none(folder, tokenizer, caplog):
    items = {"last_word": LAST_WORD, "next_sentence": NEXT_SENTENCE, "news_rolling": [{"text": "Once upon a time."}]}
    write(folder, "first_word", [{"context": "", "target": "once"}], **WORD)
    model = tiny_llama(max_position_embeddings=64)
    arguments = ({"test": WINDOWS}, items, asked(*items, "first_word"), Group())
    with_tokens, _ = evaluate(Saved(model, tokenizer), *arguments)
    figures, details = evaluate(Saved(model, byte_tokenizer()), *arguments)
    assert "not_measured" not in with_tokens.pop("protocol")
    left_out = figures.pop("protocol")["not_measured"]
    assert set(left_out) == {"news_rolling", "first_word"}
    assert all("a begin or end token" in reason for reason in left_out.values())
    assert "not measured: news_rolling" in caplog.text
    assert {"token_perplexity/news", "acc/last_word", "acc_norm/next_sentence"} < set(figures)
    assert figures == {name: with_tokens[name] for name in figures}
    assert len(details["nats_by_window"]["news"]) == 2


def test_a_task_that_generates_needs_an_end_token(folder):
    write(folder, "sums", [{"context": "1+1=", "target": "2"}], **WORD | {"output_type": "generate_until"})
    figures, missing = measured(tiny_llama(), byte_tokenizer(bos_token="<s>"), ["sums"])
    assert figures == {}
    assert "end token" in missing["sums"]


def surrounded(single):
    """A tokenizer that puts its special tokens around every text by itself."""
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    named = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=named)
    return tokenizer


def test_an_end_token_that_the_tokenizer_adds_is_no_part_of_an_answer(folder):
    """Nor of the context before it, where lm-eval would have both."""
    items = {"last_word": LAST_WORD, "next_sentence": NEXT_SENTENCE, "news_rolling": [{"text": "Once upon a time."}]}
    write(folder, "sums", [{"context": "1+1=", "target": "2"}], **WORD | {"output_type": "generate_until"})
    expected, _ = measured(tiny_llama(), surrounded("<s> $A"), list(items), items)
    figures, missing = measured(tiny_llama(), surrounded("<s> $A </s>"), [*items, "sums"], items)
    assert figures == expected
    assert "ends every text with an end token" in missing["sums"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: None, "evaluation.tasks: own: not a task of lm-eval"),
        (lambda folder: write(folder, "own", [], **CHOICE), "lm-eval cannot load own"),
        (lambda folder: write(folder, "own", NEXT_SENTENCE[:1], **CHOICE), "processes = 2, but task own has 1 items"),
        (lambda folder: write(folder, "own", NEXT_SENTENCE, **CHOICE, unsafe_code=True), "own runs code that a model"),
        (lambda folder: write(folder, "own", group="own", task=["no_such"]), "lm-eval cannot load own"),
        (
            lambda folder: write(
                folder, "own", NEXT_SENTENCE, **CHOICE | {"dataset_kwargs": {"data_files": "no.jsonl"}}
            ),
            "lm-eval cannot load own: FileNotFoundError",
        ),
    ],
    ids=["unknown", "empty", "few items", "unsafe", "group of nothing", "no data"],
)
def test_tasks_that_cannot_be_are_refused_before_anything_is_computed(folder, tokenizer, change, message):
    change(folder)
    model = tiny_llama()
    model.register_forward_hook(lambda *_: pytest.fail("computed before the tasks were looked at"))
    with pytest.raises(EvaluationError, match=message):
        evaluate(Saved(model, tokenizer), {"test": WINDOWS}, {}, asked("own"), Group(0, 2))
