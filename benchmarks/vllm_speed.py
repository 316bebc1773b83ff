"""Is a compressed folder faster than the dense one in vLLM? Ratios to the first folder.

``python -m benchmarks.vllm_speed data/models/dense data/models/kfac-80``, by the Python of ``make test-vllm``. Each
folder has an engine of its own, and the engines take turns: prompts of random tokens, greedy answers of one length, all
prompts in one call.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import arguments, begin, interleaved, print_table, ratios, shown


def engine(folder: Path, dtype: str, eager: bool, threads: int) -> Any:
    from vllm import LLM

    os.environ["OMP_NUM_THREADS"] = str(threads)  # which the engine's process inherits
    return LLM(str(folder), dtype=dtype, max_model_len=512, enforce_eager=eager, disable_log_stats=True)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    asked = parser.parse_args()
    begin(asked)
    from vllm import SamplingParams

    ids = torch.randint(100, 10_000, (asked.prompts, asked.prompt_tokens), generator=torch.Generator().manual_seed(0))
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    sampling = SamplingParams(temperature=0, max_tokens=asked.new_tokens, ignore_eos=True)
    engines = {folder.name: engine(folder, asked.dtype, asked.eager, asked.threads) for folder in asked.folders}
    ways = {name: partial(llm.generate, prompts, sampling, use_tqdm=False) for name, llm in engines.items()}
    times = interleaved(ways, asked.rounds)
    first, tokens = next(iter(times)), asked.prompts * asked.new_tokens
    rows = [
        [name, shown([tokens / s for s in times[name]], digits=1), shown(ratios(times, first, name))] for name in times
    ]
    print_table(["folder", "new tokens per second", f"ratio to {first}"], rows)


if __name__ == "__main__":
    main()
