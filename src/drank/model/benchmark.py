"""How fast a language model is, and against another one on a machine that others use too.

Takes loaded models and token ids. All is timed round robin: every model once, then every
model once more. A ratio is taken within a round, so that what slows the machine for a while slows both of its sides;
medians over the rounds are reported, with the quartiles between which half of the rounds are.

    prefill       tokens/s    tokens of the prompt over the time of one pass over it that fills the cache
    first_token   s           from the call of `generate` to the first new token
    decode        tokens/s    new tokens after the first over the time from first to last: greedy, cached, batch 1
    forward_only  tokens/s    tokens of a batch over the time of a plain pass, without cache, with all logits: what much
                              of the literature calls throughput; nothing is generated
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from drank.model.vocabulary import n_positions

FIGURES = {"prefill": "tokens/s", "decode": "tokens/s", "first_token": "s", "forward_only": "tokens/s"}
PARTS = ("prefill", "generation", "forward")  # what is timed at once; generation gives two figures

Clock = Callable[[], float]
Progress = Callable[[Iterable[int]], Iterable[int]]
K = TypeVar("K")
T = TypeVar("T")


class BenchmarkError(ValueError):
    """The model cannot be timed as asked; the message says why."""


@dataclass(frozen=True)
class Quartiles:
    """Median of samples, and the quartiles around it, interpolated linearly between the sorted samples."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quartiles":
        """Quartiles of one sample or more; a single one is all three."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        return cls(*quantiles(samples, n=4, method="inclusive"))

    @classmethod
    def of_ratios(cls, samples: Sequence[float], reference: Sequence[float]) -> "Quartiles":
        """Quartiles of sample / reference, round by round."""
        return cls.of([a / b for a, b in zip(samples, reference, strict=True)])


def round_robin(
    cases: Mapping[K, Callable[[], T]], repeats: int, warmup: int = 1, progress: Progress = iter
) -> dict[K, list[T]]:
    """Results of each case in each of ``repeats`` rounds, after ``warmup`` rounds that do not count.

    Raises:
        BenchmarkError: fewer than one round.
    """
    if repeats < 1 or warmup < 0:
        raise BenchmarkError(f"repeats = {repeats}, warmup = {warmup}: a median needs 1 round or more; 5 tell a spread")
    samples: dict[K, list[T]] = {case: [] for case in cases}
    for number in progress(range(warmup + repeats)):
        for case, run in cases.items():
            sample = run()
            if number >= warmup:
                samples[case].append(sample)
    return samples


def measure(
    runs: Mapping[str, Callable[[str], Mapping[str, float]]],
    repeats: int,
    warmup: int = 1,
    progress: Progress = iter,
) -> dict[str, dict[str, list[float]]]:
    """The four figures of every model, a sample per round: by model, then by figure.

    Within a round all models do one thing before they do the next, so that what is compared is close in time.

    Args:
        runs: by name of a model, what does one of ``PARTS`` with it, such as a :class:`Subject`, here or in a process
            of its own.
        progress: wraps the rounds (tqdm).

    Raises:
        BenchmarkError: fewer than one round.
    """
    cases = {(name, part): partial(run, part) for part in PARTS for name, run in runs.items()}
    samples: dict[str, dict[str, list[float]]] = {name: {figure: [] for figure in FIGURES} for name in runs}
    for (name, _), rounds in round_robin(cases, repeats, warmup, progress).items():
        for figures in rounds:
            for figure, value in figures.items():
                samples[name][figure].append(value)
    return samples


class Subject:
    """A causal language model of transformers, and the token ids that it is timed with; the model is left as it was.

    Args:
        model: in evaluation mode.
        prompt: of one window, for prefill and generation.
        batch: for the forward-only pass.
        new_tokens: how many are generated.
        clock: seconds from any origin.

    Raises:
        BenchmarkError: fewer than two new tokens, or more tokens in all than the model has positions for.
    """

    def __init__(
        self,
        model: Any,
        prompt: Int64[Tensor, "1 prompt_length"],
        batch: Int64[Tensor, "n_windows window_length"],
        new_tokens: int,
        clock: Clock = time.perf_counter,
    ) -> None:
        _check_length(model, prompt.shape[1], new_tokens, batch.shape[1])
        self.device = next(model.parameters()).device
        self.model, self.new_tokens, self.clock = model, new_tokens, clock
        self.prompt, self.batch = prompt.to(self.device), batch.to(self.device)

    def __call__(self, part: str) -> dict[str, float]:
        """Do one of ``PARTS``; the figures that it gives."""
        with torch.inference_mode():
            return {"prefill": self.prefill, "generation": self.generation, "forward": self.forward}[part]()

    def prefill(self) -> dict[str, float]:
        """One pass over the prompt that fills the cache, with the logits of the last token alone, as in `generate`."""
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        return {"prefill": self._rate(self.prompt, use_cache=True, **last)}

    def generation(self) -> dict[str, float]:
        """One greedy `generate`, timed at each token as a streamer is handed it; the end-of-text token is barred."""
        stamps = _Stamps(self.clock)
        synchronize(self.device)
        start = self.clock()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,  # never used, but transformers warns without one
            streamer=stamps,
        )
        first, *_, last = stamps.times
        return {"first_token": first - start, "decode": (len(stamps.times) - 1) / (last - first)}

    def forward(self) -> dict[str, float]:
        """One plain pass over the batch: no cache, all logits."""
        return {"forward_only": self._rate(self.batch, use_cache=False)}

    def _rate(self, ids: Tensor, **options: Any) -> float:
        return ids.numel() / seconds(partial(self.model, ids, **options), self.device, self.clock)


def seconds(run: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """How long a call takes, with all that it leaves to an accelerator."""
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes of this process at their peak: what torch has allocated on a CUDA device; else resident memory.

    Resident memory is what the operating system counts: pages of mapped files, such as weights, are in it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage has the peak of the parent too, if that was larger when it started us
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss  # bytes on macOS


class _Stamps:
    """A streamer of transformers that keeps the time of every token, and not the prompt, which it is handed first."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.has_prompt = clock, False
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        if self.has_prompt:
            self.times.append(self.clock())
        self.has_prompt = True

    def end(self) -> None:
        pass


def _check_length(model: Any, prompt_length: int, new_tokens: int, window_length: int) -> None:
    if new_tokens < 2:
        raise BenchmarkError(
            f"{new_tokens} new tokens: decoding is timed from the first to the last; ask for 2 or more"
        )
    positions = n_positions(model.config)
    if positions is not None and max(prompt_length + new_tokens, window_length) > positions:
        raise BenchmarkError(
            f"a prompt of {prompt_length} tokens and {new_tokens} new ones, and windows of {window_length}, "
            f"but the model has {positions} positions; ask for a shorter prompt or fewer new tokens"
        )
