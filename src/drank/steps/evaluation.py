"""Evaluation: a language model's size, token perplexities and lm-eval's figures, however it was compressed.

Every function leaves the model as it was.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from itertools import islice
from numbers import Real
from typing import Any

from torch import Tensor, distributed, nn

from drank.model.format import SCALES
from drank.model.forms import numbers_in_integers
from drank.model.perplexity import perplexity, window_nats
from drank.model.precision import name_of
from drank.model.saved import Saved
from drank.model.vocabulary import check_windows, n_positions
from drank.project.params import Evaluation
from drank.project.processes import Group

Items = Mapping[str, Sequence[Mapping[str, Any]]]  # of tasks, by task
Progress = Callable[[Iterable[int]], Iterable[int]]

log = logging.getLogger("drank.evaluation")
MAX_LENGTH = 2048  # tokens in a window of lm-eval, fewer if the model has fewer positions
FEWSHOT_SEED = 1234  # lm-eval's own, of tasks that show examples
OF_ALLOCATION = ("variant", "preset", "size_ratio", "bytes_ratio", "megabytes", "kept_ratio", "targeted_parameters")


def _kind(output_type: str, doc_to_text: str, doc_to_target: str, **aggregations: str) -> dict[str, Any]:
    """lm-eval's description of a kind of task, with its metrics."""
    metrics = [
        {"metric": name, "aggregation": aggregation, "higher_is_better": aggregation == "mean"}
        for name, aggregation in aggregations.items()
    ]
    texts = {"doc_to_text": doc_to_text, "doc_to_target": doc_to_target}
    return {"output_type": output_type, **texts, "metric_list": metrics}


ROLLING = _kind(
    "loglikelihood_rolling", "", "{{text}}", bits_per_byte="bits_per_byte", word_perplexity="weighted_perplexity"
)
LAST_WORD = _kind("loglikelihood", "{{context}}", "{{' ' + target}}", acc="mean", perplexity="perplexity")
NEXT_SENTENCE = _kind("multiple_choice", "{{context}}", "label", acc="mean", acc_norm="mean") | {
    "doc_to_choice": "choices"
}


class EvaluationError(ValueError):
    """A task is unknown, or a figure does not exist; the message says which and why."""


def count_parameters(model: nn.Module) -> int:
    """Stored numbers of a model: parameters, shared ones (tied embeddings) once, and the few floating-point buffers
    that are saved with them, such as the bias of a router. Numbers stored as integers count, what scales them not."""
    stored = model.state_dict().keys()
    tensors = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in stored}
    scales = {name + SCALES for name in tensors}
    numbers = sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and name not in scales)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return numbers + (numbers_in_integers(config.specs) if config else 0)


def origin(allocation: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the results that tells what was measured: names, sizes, and bits where weights have less than 16."""
    bits = {unit["bits"] for unit in allocation["units"] if "bits" in unit}
    rounded = {"bits": bits.pop() if len(bits) == 1 else "mixed"} if bits else {}
    return {key: allocation[key] for key in OF_ALLOCATION if key in allocation} | rounded


def evaluate(
    saved: Saved, drawn: Mapping[str, Mapping[str, Tensor]], items: Items, asked: Evaluation, group: Group
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All figures by name with ``parameters``, ``bytes`` and ``protocol``; and, as details, the nats of every test
    window by text and the loss curve of healing.

    Processes share out windows, and the items of tasks; lm-eval's figures are those of the first process. The log and
    ``protocol.not_measured`` tell which tasks and figures are missing, and why.

    Args:
        drawn: ``test`` has (n, length) windows by text; ``last``, if it is there, the shorter window at the end of
            each text.
        items: of the tasks that sampling wrote, by task.

    Raises:
        EvaluationError: see :func:`load_tasks`; nothing was computed.
        NotFiniteLossError: a window's loss is not finite.
    """
    model, tasks = saved.model, load_tasks(items, asked.tasks, saved.tokenizer, group.size)
    measured = {file: drawn[file] for file in ("test", "last") if file in drawn}
    for file, texts in measured.items():
        for name, windows in texts.items():
            check_windows(model, windows.view(-1, windows.shape[-1]), f"data/sampling/{file}.safetensors, {name}")
    tests, last = measured["test"], measured.get("last", {})
    figures: dict[str, Any] = {"parameters": count_parameters(model), "bytes": saved.n_bytes}
    nats: dict[str, list[float]] = {}
    for name, windows in sorted(tests.items()):
        mine, bar = windows[group.share], partial(group.progress, desc=name, unit="batches")
        parts = group.gather(window_nats(model, mine, asked.batch_windows, bar) if len(mine) else [])
        nats[name] = [parts[i % group.size][i // group.size] for i in range(len(windows))]
        if name in last:
            nats[name] += window_nats(model, last[name][None], 1)
        ends = len(last[name]) if name in last else None
        figures[f"token_perplexity/{name}"] = perplexity(nats[name], windows.shape[1], ends)
        log.info("token perplexity of %s: %.4f", name, figures[f"token_perplexity/{name}"])
    bar = partial(group.progress, desc="lm-eval", unit="requests")
    figures |= run_tasks(model, saved.tokenizer, tasks, asked.batch_windows, bar)
    for name, reason in tasks.missing.items():
        log.warning("not measured: %s: %s", name, reason)
    figures["protocol"] = {
        "dtype": name_of(model.dtype),
        "lm_eval_max_length": MAX_LENGTH,
        "tasks": list(asked.tasks),
        "test_windows": {name: list(windows.shape) for name, windows in tests.items()},
        **({"last_windows": {name: len(window) for name, window in last.items()}} if last else {}),
        **({"not_measured": tasks.missing} if tasks.missing else {}),
    }
    return figures, {"nats_by_window": nats} | ({"loss_curve": saved.loss_curve} if saved.loss_curve else {})


@dataclass
class Tasks:
    """lm-eval's tasks and groups.

    Attributes:
        ours: names of the tasks that sampling wrote.
        loaded: lm-eval's ``tasks`` and ``groups``, by name.
        missing: the reason by the name of a task or figure that cannot be measured.
    """

    ours: frozenset[str]
    loaded: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tasks": {}, "groups": {}})
    missing: dict[str, str] = field(default_factory=dict)


def load_tasks(items: Items, names: Sequence[str], tokenizer: Any, n_processes: int = 1) -> Tasks:
    """Tasks and groups by their names, with their items, before anything is computed.

    A task that is in ``items`` is ours and needs no network; any other name is one of lm-eval's own. A task that needs
    a token that the tokenizer lacks is left out.

    Raises:
        EvaluationError: a task is neither ours nor lm-eval's, cannot be loaded, has fewer items than there are
            processes, or would run code that a model writes.
    """
    found = Tasks(frozenset(names) & frozenset(items))
    if not names:
        return found
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not found.ours.issuperset(names))
    if unknown := sorted(set(names).difference(found.ours, manager.all_tasks)):
        raise EvaluationError(
            f"evaluation.tasks: {', '.join(unknown)}: not a task of lm-eval, nor one that sampling wrote "
            f"({', '.join(sorted(items)) or 'there are none'})"
        )
    for name in names:
        try:
            loaded = manager.load([_task(name, items[name]) if name in found.ours else name])
            missing = {key: reason for key, task in loaded["tasks"].items() if (reason := _lacks(task, tokenizer))}
        except Exception as error:  # of the network, of a package that is missing, of code that a task brings
            raise EvaluationError(
                f"evaluation.tasks: lm-eval cannot load {name}: {type(error).__name__}: {error}; its own tasks come "
                f"from the hub, and some need packages of their own"
            ) from error
        for key, task in loaded["tasks"].items():
            _prepare(key, task, n_processes)
        found.missing |= missing
        if not missing:
            for kind, rows in found.loaded.items():
                rows.update(loaded[kind])
    return found


def _prepare(name: str, task: Any, n_processes: int) -> None:
    """Refuse a task that cannot be run, and set what lm-eval's simple_evaluate sets, which also asks pip for every
    package."""
    if (n_items := len(task.eval_docs)) < n_processes:
        raise EvaluationError(
            f"evaluation.processes = {n_processes}, but task {name} has {n_items} items, and each process needs one"
        )
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise EvaluationError(f"evaluation.tasks: {name} runs code that a model writes, or reads images; leave it out")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    aggregation = task.aggregation()
    aggregation.update({metric: _bounded(function) for metric, function in aggregation.items()})


def _lacks(task: Any, tokenizer: Any) -> str:
    """The reason why a tokenizer will not do; lm-eval would fail at the first request."""
    begin, end = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos"))
    if task.OUTPUT_TYPE == "generate_until" and end is None:
        return "text is generated up to an end token, and the tokenizer has none"
    if task.OUTPUT_TYPE == "generate_until" and _adds_end(tokenizer):
        return "the tokenizer ends every text with an end token, so a model has nothing to add"
    is_first = task.OUTPUT_TYPE == "loglikelihood_rolling" or any(task.doc_to_text(doc) == "" for doc in task.eval_docs)
    if is_first and begin is None and end is None:
        return "a text's first token is predicted from a begin or end token, and the tokenizer has neither"
    return ""


def _adds_end(tokenizer: Any) -> bool:
    """True if a tokenizer puts its end token behind every text."""
    last, plain = (tokenizer.encode("a", add_special_tokens=flag)[-1:] for flag in (True, False))
    return bool(last == [tokenizer.eos_token_id] != plain)


def _bounded(aggregate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same aggregation, infinite where a number is too large: of text without spaces, a word is a paragraph."""

    @wraps(aggregate)
    def bounded(values: Any) -> Any:
        try:
            return aggregate(values)
        except OverflowError:
            return math.inf
        except ZeroDivisionError:
            return math.nan

    return bounded


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    batch_size: int,
    progress: Progress = iter,
) -> dict[str, float]:
    """lm-eval's figures by flat name: ``acc/last_word``, ``bits_per_byte/news``, ``acc_stderr/last_word``...

    Our tasks lose the suffix ``_rolling``, so that a text has one name in all its figures. An accuracy p of n
    items has the standard error sqrt(p (1 - p) / n). In a group of torch.distributed, each process takes its share of
    the items, and process 0 alone gets figures. Figures that are no finite numbers go to ``tasks.missing``.

    Args:
        progress: wraps the numbers of the requests of one kind, or of the windows of texts that are read as a whole.
    """
    if not tasks.loaded["tasks"]:
        return {}
    import lm_eval
    from accelerate import Accelerator

    # With its logits cache, windows of a repetitive text can be given each other's logits within a batch.
    lm = _counting(progress)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=min(MAX_LENGTH, n_positions(model.config) or MAX_LENGTH),
        logits_cache=False,
    )
    if distributed.is_initialized():
        # HFLM takes its share of the requests only of models that it loads by itself.
        lm._rank, lm._world_size = distributed.get_rank(), distributed.get_world_size()
        lm.accelerator = Accelerator(cpu=lm.device.type == "cpu")
    results = lm_eval.evaluate(lm=lm, task_dict=tasks.loaded, bootstrap_iters=0, log_samples=False)
    if not results:
        return {}
    figures, unread = _flat(results["results"], results["n-samples"], tasks.ours)
    tasks.missing |= unread
    return figures


def _counting(progress: Progress) -> Any:
    """lm-eval's class of models, which shows ``progress`` in the place of its bars."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        _ticks: Iterator[int] = iter(())
        _adds_end = cached_property(lambda self: _adds_end(self.tokenizer))

        def _counted(self, run: Callable[..., Any], requests: list[Any], total: int) -> Any:
            self._ticks = iter(progress(range(total)))
            found = run(requests, disable_tqdm=True)
            deque(self._ticks, maxlen=0)  # the bar ends, also where processes share requests out unevenly
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return self._counted(super().loglikelihood, requests, len(requests))

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            windows = sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests)
            return self._counted(super().loglikelihood_rolling, requests, windows)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> Any:
            # Without a begin and an end token, lm-eval fails where it asks whether the string begins with one.
            if add_special_tokens is None and self.prefix_token_id is None:
                add_special_tokens = self.add_bos_token is not False
            ids = super().tok_encode(string, add_special_tokens, **options)
            # An end token that the tokenizer adds would be part of the answer, and of the context before it.
            added = self._adds_end and add_special_tokens is not False and ids[-1:] == [self.tokenizer.eos_token_id]
            return ids[:-1] if added and not string.endswith(self.tokenizer.eos_token) else ids

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            deque(islice(self._ticks, len(inps)), maxlen=0)
            return logits

    return Counting


def _task(name: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """lm-eval's description of one of our tasks; its items come from memory, so no path is in it."""
    from datasets import Dataset

    rows = Dataset.from_list([dict(item) for item in items])
    kind = {"last_word": LAST_WORD, "next_sentence": NEXT_SENTENCE}.get(name, ROLLING)
    return {"task": name, "test_split": "test", "custom_dataset": lambda **_: {"test": rows}, **kind}


def _flat(
    results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, int]], ours: Container[str] = ()
) -> tuple[dict[str, float], dict[str, str]]:
    """Figures, and values that are none, by name. A group of tasks, such as mmlu, has figures but no items."""
    figures: dict[str, float] = {}
    unread: dict[str, str] = {}
    for task, row in sorted(results.items()):
        name = task.removesuffix("_rolling") if task in ours else task
        for key, value in row.items():
            metric, _, kind = key.partition(",")
            if not kind or value == "N/A":  # a name or a count; a standard error that lm-eval was not asked for
                continue
            label = metric if kind == "none" else key
            if not isinstance(value, Real) or not math.isfinite(figure := float(value)):
                unread[f"{label}/{name}"] = f"lm-eval gives {value!s:.60}"
                continue
            figures[f"{label}/{name}"] = figure
            if task in counts and metric.startswith("acc") and not metric.endswith("_stderr") and 0 <= figure <= 1:
                n_items = counts[task]["effective"]
                figures[f"{label}_stderr/{name}"] = math.sqrt(figure * (1 - figure) / n_items)
    return dict(sorted(figures.items())), dict(sorted(unread.items()))
