"""Sampling: windows to calibrate and to test on, and the items of tasks, from texts and a tokenizer."""

import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drank.model import text
from drank.model.vocabulary import check_windows
from drank.project.params import Begin, Sampling

Store = MutableMapping[str, Mapping[str, Tensor]]

log = logging.getLogger(__name__)


def sample(
    texts: Mapping[str, Sequence[str]],
    tokenizer: Any,
    config: Any,
    asked: Sampling,
    evaluated: Collection[str],
    store: Store,
    items: MutableMapping[str, list[Any]],
) -> dict[str, Any]:
    """Draw everything, deterministic in the seeds.

    Args:
        config: the model's, which says what token ids and lengths it has embeddings for.
        evaluated: names of tasks. Items of another task are left out, with a warning, if the text has too few.
        store: takes ``calibration/<seed>`` with (n, length) ``windows``; ``calibration_text`` with the ``tokens`` that
            they are drawn from and, if windows have it in front, the ``begin`` token; ``test`` with (n, length) windows
            by text; and ``last`` with the shorter windows at the ends of texts, if they count.
        items: takes the items of tasks, by task.

    Returns:
        The summary: what was asked, ``begin_token``, and counts, ``texts`` and ``task_items``.

    Raises:
        SamplingError: a text is too short for what is asked of it; the message has its name.
        TokenError: the model lacks an embedding of a window.
    """
    counts: dict[str, dict[str, int]] = {}
    tests, last = dict[str, Tensor](), dict[str, Tensor]()
    drawn: dict[str, list[Any]] = {}
    for name, documents in texts.items():
        unchanged = asked.documents == "unchanged"
        held_out = text.Picked(documents, range(len(documents))) if unchanged else text.clean(documents)
        counts[name] = {"documents": len(documents), "empty_or_repeated": len(documents) - len(held_out)}
        try:
            if name == asked.calibration_text:
                calibrated, held_out = _split(held_out, asked)
                counts[name] |= _calibrate(calibrated, tokenizer, config, asked, store)
                if held_out and asked.n_task_items:
                    drawn |= _items(held_out, asked, evaluated, name)
            elif not unchanged:
                held_out = text.shuffled(held_out, asked.seed)
            if held_out:
                stream, first = _stream(held_out, tokenizer, asked.test_begin)
                counts[name] |= {"test_documents": len(held_out), "test_tokens": len(stream)}
                n_full = asked.n_test_windows if isinstance(asked.n_test_windows, int) else None
                tests[name] = text.consecutive_windows(stream, n_full, asked.window_length, first)
                check_windows(config, tests[name], f"windows drawn for {name}")
                short = text.short_last_window(stream, asked.window_length, first)
                if short is not None and asked.n_test_windows == "all":
                    last[name] = short
                drawn[f"{name}_rolling"] = text.rolling_items(document for document in held_out if document.strip())
        except text.SamplingError as error:
            raise text.SamplingError(f"text.{name}: {error}") from None
    store["test"] = tests
    if last:
        store["last"] = last
    items.update(drawn)
    n_items = {task: len(of_task) for task, of_task in drawn.items()}
    told = {"begin_token": text.begin_token(tokenizer), "texts": counts, "task_items": n_items}
    return asked.model_dump(exclude_none=True) | told


def _split(documents: text.Picked, asked: Sampling) -> tuple[text.Picked, text.Picked]:
    """Documents to calibrate on, and those held out."""
    calibrated, held_out = documents, documents[:0]
    if asked.held_out_share:
        calibrated, held_out = text.split_documents(documents, asked.held_out_share, asked.seed)
    return calibrated[: asked.calibration_documents], held_out


def _stream(documents: Sequence[str], tokenizer: Any, begin: Begin | None) -> tuple[Tensor, int | None]:
    """The tokens of documents, and the begin token of every window if it is put there."""
    begin = begin or "window"
    return text.token_stream(documents, tokenizer, begin), text.begin_token(tokenizer) if begin == "window" else None


def _calibrate(documents: Sequence[str], tokenizer: Any, config: Any, asked: Sampling, store: Store) -> dict[str, int]:
    stream, first = _stream(documents, tokenizer, asked.calibration_begin)
    if asked.n_windows * asked.window_length > len(stream):
        log.warning(
            "sampling.n_windows = %d windows of %d tokens are drawn from %d tokens, so they repeat: lower it, or take "
            "more text", asked.n_windows, asked.window_length, len(stream),
        )  # fmt: skip
    draw = text.draw_consecutive_windows if asked.calibration_draw == "windows" else text.draw_windows
    begin = {} if first is None else {"begin": torch.tensor([first])}
    store["calibration_text"] = {"tokens": stream.int()} | begin
    for seed in asked.calibration_seeds:
        windows = draw(stream, asked.n_windows, asked.window_length, seed, first)
        check_windows(config, windows, f"windows drawn for {seed}")
        store[f"calibration/{seed}"] = {"windows": windows}
    return {"calibration_documents": len(documents), "calibration_tokens": len(stream)}


def _items(
    documents: Sequence[str], asked: Sampling, evaluated: Collection[str], name: str
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for task, make in (("last_word", text.last_word_items), ("next_sentence", text.next_sentence_items)):
        try:
            found[task] = make(documents, asked.n_task_items, asked.seed)
        except text.SamplingError as error:
            if task in evaluated:
                raise text.SamplingError(f"{error}; or take {task} out of evaluation.tasks") from None
            log.warning("text.%s: no task %s: %s", name, task, error)
    return found
