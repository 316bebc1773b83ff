"""Times of alternatives taken in turn, the machine's speed at matrix products, and tables of both."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Times = dict[str, list[float]]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every script, which hands them to :func:`begin`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    clock = "wall, or cpu: seconds of all threads, which other work on the machine does not stretch"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    return parser


def begin(asked: argparse.Namespace) -> None:
    global _clock
    _clock = CLOCKS[asked.clock]
    torch.set_num_threads(asked.threads)
    print(
        f"{asked.rounds} rounds, {asked.threads} threads, {asked.clock} clock; seconds are median (least to greatest)\n"
    )


def interleaved(alternatives: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: bool = True) -> Times:
    """Seconds of each alternative in each round. They take turns, so a busy minute of the machine meets all of them."""
    if warm_up:
        for run in alternatives.values():
            run()
    times: Times = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            times[name].append(seconds(run))
    return times


def seconds(run: Callable[[], Any]) -> float:
    start = _clock()
    run()
    return _clock() - start


def shown(times: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median, and least and greatest."""
    values = (statistics.median(times), min(times), max(times))
    middle, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def ratios(times: Times, of: str, to: str) -> list[float]:
    """Round by round, so that what slowed a round down cancels."""
    return [a / b for a, b in zip(times[of], times[to], strict=True)]


def product(dtype: torch.dtype, size: int = 1536) -> Callable[[], torch.Tensor]:
    """A matrix product of 2 size³ FLOPs: what the library reaches here, not what the data sheet says."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: a @ b


def speeds(flops: float, times: Sequence[float]) -> list[float]:
    """GFLOP/s."""
    return [flops / t / 1e9 for t in times]


def llama(n_layers: int, width: int) -> Any:
    """A random Llama in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
