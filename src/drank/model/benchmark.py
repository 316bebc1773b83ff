"""How fast a language model is, over another one on a machine that others use too.

Every model is timed once per round. A ratio is taken within a round, so that a slow spell of the machine slows both of
its sides; medians over the rounds are reported, with the quartiles between which half of the rounds are.

    prefill       tokens/s    tokens of the prompt over the time of one pass over it that fills the cache
    first_token   s           from the call of `generate` to the first new token
    decode        tokens/s    new tokens after the first over the time from first to last: greedy, cached, batch 1
    forward_only  tokens/s    tokens of a batch over the time of a plain pass, without cache, with all logits: much of
                              the literature calls it throughput; nothing is generated
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from drank.model.vocabulary import n_positions

# By figure: the part of the work that it is timed in, and its unit. Parts are timed separately.
FIGURES = {
    "prefill": ("prefill", "tokens/s"),
    "decode": ("generation", "tokens/s"),
    "first_token": ("generation", "s"),
    "forward_only": ("forward", "tokens/s"),
}

K = TypeVar("K")
T = TypeVar("T")


class BenchmarkError(ValueError):
    """The model cannot be timed as asked; the message says why."""


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile, interpolated linearly between the sorted samples (one or more)."""
    return dict(zip(("lower", "median", "upper"), np.quantile(samples, (0.25, 0.5, 0.75)).tolist(), strict=True))


def round_robin(
    cases: Mapping[K, Callable[[], T]], repeats: int, progress: Callable[[range], Iterable[int]] = iter
) -> dict[K, list[T]]:
    """Results of each case in each of ``repeats`` rounds, after one round that does not count.

    ``progress`` wraps the rounds (tqdm). Times that are compared belong to cases that follow each other.
    """
    samples: dict[K, list[T]] = {case: [] for case in cases}
    for _ in progress(range(1 + repeats)):
        for case, run in cases.items():
            samples[case].append(run())
    return {case: results[1:] for case, results in samples.items()}


class Subject:
    """A causal language model of transformers, and the token ids that it is timed with; the model is left as it was.

    Args:
        model: in evaluation mode.
        windows: ids of the forward-only pass; the first window is the prompt.
        new_tokens: how many are generated, 2 or more.
        clock: seconds from any origin.

    Raises:
        BenchmarkError: more tokens in all than the model has positions for.
    """

    def __init__(
        self,
        model: Any,
        windows: Int64[Tensor, "n_windows window_length"],
        new_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        length, positions = windows.shape[1], n_positions(model.config)
        if positions is not None and length + new_tokens > positions:
            raise BenchmarkError(
                f"a prompt of {length} tokens and {new_tokens} new ones, but the model has {positions} positions; ask "
                "for a shorter prompt or fewer new tokens"
            )
        self.device = next(model.parameters()).device
        self.model, self.new_tokens, self.clock, self.windows = model, new_tokens, clock, windows.to(self.device)

    def __call__(self, part: str) -> dict[str, float]:
        """Do a part of the work; the figures that it gives."""
        with torch.inference_mode():
            return getattr(self, part)()

    def prefill(self) -> dict[str, float]:
        """One pass over the prompt that fills the cache, with the logits of the last token alone, as in `generate`."""
        last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        return {"prefill": self._rate(self.windows[:1], use_cache=True, **last)}

    def generation(self) -> dict[str, float]:
        """One greedy `generate`, timed at each token as a streamer is handed it; the end-of-text token is barred."""
        prompt, times = self.windows[:1], list[float]()
        streamer = SimpleNamespace(put=lambda _: times.append(self.clock()), end=lambda: None)
        start = self._now()
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,  # never used, but transformers warns without one
            streamer=streamer,
        )
        _, first, *_, last = times  # the prompt is handed over before the tokens
        return {"first_token": first - start, "decode": (self.new_tokens - 1) / (last - first)}

    def forward(self) -> dict[str, float]:
        """One plain pass over all windows: no cache, all logits."""
        return {"forward_only": self._rate(self.windows, use_cache=False)}

    def _rate(self, ids: Tensor, **options: Any) -> float:
        start = self._now()
        self.model(ids, **options)
        return ids.numel() / (self._now() - start)

    def _now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def peak_memory(device: torch.device) -> int:
    """Bytes of this process at their peak: memory that torch has allocated on a CUDA device; else resident memory.

    Resident memory is what the operating system counts, pages of mapped files, such as weights, included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage has the peak of the parent too, if that was larger when it started us
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss  # bytes on macOS
