"""Sampling: what is calibrated on, what is tested on, and the items of tasks, of texts and a tokenizer."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drank.model import text
from drank.project.params import Sampling

log = logging.getLogger(__name__)


@dataclass
class Drawn:
    """Everything that a run calibrates and tests on.

    Attributes:
        calibration: (n, length) windows by calibration seed.
        calibration_text: ``tokens`` that windows are drawn from and, if windows have it in front, the ``begin`` token.
        tests: (n, length) windows by text.
        last: by text, the shorter window at its end, where that counts.
        tasks: items by task.
        summary: what was asked, the begin token, and counts.
    """

    calibration: dict[str, Tensor] = field(default_factory=dict)
    calibration_text: dict[str, Tensor] = field(default_factory=dict)
    tests: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    tasks: dict[str, list[Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def sample(texts: Mapping[str, Sequence[str]], tokenizer: Any, asked: Sampling, tasks: Collection[str]) -> Drawn:
    """Draw everything, deterministic in the seeds.

    Args:
        tasks: what is evaluated. Items of another task are left out, with a warning, if the text has too few.

    Raises:
        SamplingError: a text is too short for what is asked of it; the message has its name.
    """
    drawn, counts = Drawn(), {}
    for name, documents in texts.items():
        whole = text.Picked(documents, range(len(documents)))
        cleaned = whole if asked.documents == "unchanged" else text.clean(documents)
        counts[name] = {"documents": len(documents), "empty_or_repeated": len(documents) - len(cleaned)}
        try:
            if name == asked.calibration_text:
                held_out = _calibrate(cleaned, tokenizer, asked, drawn, counts[name])
                _make_items(name, held_out, asked, drawn, tasks)
            else:
                held_out = cleaned if asked.documents == "unchanged" else text.shuffled(cleaned, asked.seed)
            if held_out:
                _test(name, held_out, tokenizer, asked, drawn, counts[name])
        except text.SamplingError as error:
            raise text.SamplingError(f"text.{name}: {error}") from None
    items = {name: len(items) for name, items in drawn.tasks.items()}
    told = {"begin_token": text.begin_token(tokenizer), "texts": counts, "task_items": items}
    drawn.summary = asked.model_dump(exclude_none=True) | told
    return drawn


def _calibrate(
    documents: Sequence[str], tokenizer: Any, asked: Sampling, drawn: Drawn, counts: dict[str, int]
) -> Sequence[str]:
    """Draw calibration windows; returns the documents that are held out."""
    calibrated, held_out = documents, documents[:0]
    if asked.held_out_share:
        calibrated, held_out = text.split_documents(documents, asked.held_out_share, asked.seed)
    calibrated = calibrated[: asked.calibration_documents]
    begin = asked.calibration_begin or "window"
    stream = text.token_stream(calibrated, tokenizer, begin)
    counts |= {"calibration_documents": len(calibrated), "calibration_tokens": len(stream)}
    if asked.n_windows * asked.window_length > len(stream):
        log.warning(
            "sampling.n_windows = %d windows of %d tokens are drawn from %d tokens, so they repeat: lower it, or take "
            "more text", asked.n_windows, asked.window_length, len(stream),
        )  # fmt: skip
    draw = text.draw_consecutive_windows if asked.calibration_draw == "windows" else text.draw_windows
    first = text.begin_token(tokenizer) if begin == "window" else None
    drawn.calibration_text = {"tokens": stream.int()} | ({} if first is None else {"begin": torch.tensor([first])})
    for seed in asked.calibration_seeds:
        drawn.calibration[str(seed)] = draw(stream, asked.n_windows, asked.window_length, seed, first)
    return held_out


def _make_items(name: str, documents: Sequence[str], asked: Sampling, drawn: Drawn, tasks: Collection[str]) -> None:
    makers = {"last_word": text.last_word_items, "next_sentence": text.next_sentence_items}
    for task, make in makers.items() if documents and asked.n_task_items else ():
        try:
            drawn.tasks[task] = make(documents, asked.n_task_items, asked.seed)
        except text.SamplingError as error:
            if task in tasks:
                raise text.SamplingError(f"{error}; or take {task} out of evaluation.tasks") from None
            log.warning("text.%s: no task %s: %s", name, task, error)


def _test(
    name: str, documents: Sequence[str], tokenizer: Any, asked: Sampling, drawn: Drawn, counts: dict[str, int]
) -> None:
    begin, n_windows = asked.test_begin or "window", asked.n_test_windows
    stream = text.token_stream(documents, tokenizer, begin)
    counts |= {"test_documents": len(documents), "test_tokens": len(stream)}
    first = text.begin_token(tokenizer) if begin == "window" else None
    n_full = n_windows if isinstance(n_windows, int) else None
    drawn.tests[name] = text.consecutive_windows(stream, n_full, asked.window_length, first)
    last = text.short_last_window(stream, asked.window_length, first) if n_windows == "all" else None
    if last is not None:
        drawn.last[name] = last
    drawn.tasks[f"{name}_rolling"] = text.rolling_items(document for document in documents if document.strip())
