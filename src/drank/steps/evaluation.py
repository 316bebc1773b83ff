"""Evaluation: a language model's size, token perplexities and lm-eval's figures, however it was compressed.

Every function leaves the model as it was.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, distributed, nn

from drank.model.perplexity import perplexity, window_nats
from drank.model.precision import name_of
from drank.model.vocabulary import check_ids
from drank.project.params import Evaluation
from drank.project.processes import Group

MAX_LENGTH = 2048  # tokens in a window of lm-eval, fewer if the model has fewer positions
FEWSHOT_SEED = 1234  # lm-eval's own, of tasks that show examples


def _metrics(**aggregations: str) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": aggregation, "higher_is_better": aggregation == "mean"}
        for name, aggregation in aggregations.items()
    ]


ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
    "metric_list": _metrics(bits_per_byte="bits_per_byte", word_perplexity="weighted_perplexity"),
}  # fmt: skip
LAST_WORD: dict[str, Any] = {
    "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + target}}",
    "metric_list": _metrics(acc="mean", perplexity="perplexity"),
}  # fmt: skip
NEXT_SENTENCE: dict[str, Any] = {
    "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
    "doc_to_target": "label", "metric_list": _metrics(acc="mean", acc_norm="mean"),
}  # fmt: skip


class EvaluationError(ValueError):
    """A task is unknown, or a figure does not exist; the message says which and why."""


def count_parameters(model: nn.Module) -> int:
    """Stored numbers of a model: parameters, shared ones (tied embeddings) once, and the few floating-point buffers
    that are saved with them, such as the bias of a router."""
    stored = model.state_dict().keys()
    buffers = [b for name, b in model.named_buffers() if name in stored and b.is_floating_point()]
    return sum(tensor.numel() for tensor in [*model.parameters(), *buffers])


def evaluate(
    model: Any,
    tokenizer: Any,
    tests: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    asked: Evaluation,
    group: Group,
    progress: Callable[..., Any],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """All figures by name with ``parameters`` and ``protocol``, and the nats of every test window by text.

    Processes share out windows, and the items of tasks; lm-eval's figures are those of the first process.

    Args:
        tests: (n, length) windows by text; ``last`` has the shorter window at the end of a text, if that counts.
        items: of the tasks that sampling wrote, by task.

    Raises:
        NotFiniteLossError: a window's loss is not finite.
        EvaluationError: see :func:`run_tasks`.
    """
    figures: dict[str, Any] = {"parameters": count_parameters(model)}
    figures["protocol"] = {
        "dtype": name_of(model.dtype),
        "lm_eval_max_length": MAX_LENGTH,
        "tasks": list(asked.tasks),
        "test_windows": {name: list(windows.shape) for name, windows in tests.items()},
    } | ({"last_windows": {name: len(window) for name, window in last.items()}} if last else {})
    nats: dict[str, list[float]] = {}
    for name, windows in sorted(tests.items()):
        check_ids(model, windows, f"data/sampling/test.safetensors, {name}")
        bar = partial(progress, desc=name, unit="batches")
        mine = windows[group.share]
        parts = group.gather(window_nats(model, mine, asked.batch_windows, bar) if len(mine) else [])
        nats[name] = [parts[i % group.size][i // group.size] for i in range(len(windows))]
        if name in last:
            nats[name] += window_nats(model, last[name][None], 1)
        ends = len(last[name]) if name in last else None
        figures[f"token_perplexity/{name}"] = perplexity(nats[name], windows.shape[1], ends)
    bar = partial(progress, desc="lm-eval", unit="requests")
    return figures | run_tasks(model, tokenizer, items, asked.tasks, asked.batch_windows, bar), nats


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    tasks: Sequence[str],
    batch_size: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, float]:
    """lm-eval's figures by flat name: ``acc/last_word``, ``bits_per_byte/news``, ``acc_stderr/last_word``...

    A task that is in ``items`` is ours and needs no network; any other name is one of lm-eval's own. The suffix
    ``_rolling`` is dropped, so that a text has one name in all its figures. An accuracy p of n items has the standard
    error sqrt(p (1 - p) / n). In a group of torch.distributed, each process takes its share of the items, and process 0
    alone gets figures.

    Args:
        progress: wraps the numbers of the requests of one kind, or of the windows of texts that are read as a whole.

    Raises:
        EvaluationError: a task is neither ours nor lm-eval's, or a figure is not finite.
    """
    import lm_eval
    from accelerate import Accelerator
    from lm_eval.tasks import TaskManager

    if not tasks:
        return {}
    ours = {task: items[task] for task in tasks if task in items}
    manager = TaskManager(include_defaults=not set(ours).issuperset(tasks))
    if unknown := sorted(set(tasks).difference(ours, manager.all_tasks)):
        raise EvaluationError(
            f"evaluation.tasks: {', '.join(unknown)}: not a task of lm-eval, nor one that sampling wrote "
            f"({', '.join(sorted(items)) or 'there are none'})"
        )
    # With its logits cache, windows of a repetitive text can be given each other's logits within a batch.
    lm = _counting(progress)(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH)),
        logits_cache=False,
    )
    if distributed.is_initialized():
        # HFLM takes its share of the requests only of models that it loads by itself.
        lm._rank, lm._world_size = distributed.get_rank(), distributed.get_world_size()
        few = {task: len(rows) for task, rows in sorted(ours.items()) if len(rows) < lm._world_size}
        if few:
            raise EvaluationError(
                f"evaluation.processes = {lm._world_size}, but tasks have fewer items than processes: {few}"
            )
        lm.accelerator = Accelerator(cpu=lm.device.type == "cpu")
    loaded = manager.load([_task(task, ours[task]) if task in ours else task for task in tasks])
    for task in loaded["tasks"].values():  # as simple_evaluate does, which also asks pip for every package installed
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    results = lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=False)
    return _flat(results["results"], results["n-samples"]) if results else {}


def _counting(progress: Callable[[Iterable[int]], Iterable[int]]) -> Any:
    """lm-eval's class of models, which shows ``progress`` in the place of its bars."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        _ticks: Iterator[int] = iter(())

        @contextmanager
        def _counted(self, total: int) -> Iterator[None]:
            self._ticks = iter(progress(range(total)))
            yield
            deque(self._ticks, maxlen=0)  # the bar ends, also where processes share requests out unevenly

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            with self._counted(len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            windows = sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests)
            with self._counted(windows):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

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


def _flat(results: dict[str, dict], counts: dict[str, dict]) -> dict[str, float]:
    figures = {}
    for task, row in sorted(results.items()):
        name = task.removesuffix("_rolling")
        for key, value in sorted(row.items()):
            metric, _, kind = key.partition(",")
            if not kind or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise EvaluationError(f"{task}: {metric} is {value}; look at token perplexity first")
            label = metric if kind == "none" else f"{metric},{kind}"
            figures[f"{label}/{name}"] = float(value)
            # A group of tasks, such as mmlu, has an accuracy and no items of its own.
            if task in counts and metric.startswith("acc") and not metric.endswith("_stderr"):
                n_items = counts[task]["effective"]
                figures[f"{label}_stderr/{name}"] = math.sqrt(value * (1 - value) / n_items)
    return dict(sorted(figures.items()))
