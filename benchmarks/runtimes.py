"""Which runtime makes a compressed model faster than the dense one? Ratios of times, all routes and models in turns.

``python -m benchmarks.runtimes EXPORTS DENSE COMPRESSED ... [--routes ...] [--prompt 128] [--new 32]``. Folders of
models, the dense one first; graphs are written into EXPORTS once. "of dense" is the time over that of the dense model
by the same route, round by round, and the last column over that of the same model by the first route; below 1 is
faster. The prompt is one text; decoding is single tokens behind it, each route with a cache of its own kind.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import arguments, begin, interleaved, print_table, ratios, shown
from drank.project.files import replacing_folder
from drank.serving import onnx, openvino

Step = Callable[[np.ndarray, Any], Any]  # ids and what the last step returned, None at first


def inputs(ids: np.ndarray, seen: int) -> dict[str, np.ndarray]:
    n = ids.shape[1]
    mask, positions = np.ones((1, seen + n), np.int64), np.arange(seen, seen + n)[None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def by_torch(model: Path, exports: Path, threads: int, dtype: torch.dtype) -> Step:
    from transformers import AutoModelForCausalLM, DynamicCache

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def step(ids: np.ndarray, cache: Any) -> Any:
        cache = DynamicCache([(layer.keys, layer.values) for layer in cache.layers] if cache else None)
        found = loaded(torch.from_numpy(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.past_key_values

    return step


def by_onnx(model: Path, exports: Path, threads: int, int8: bool) -> Step:
    import onnxruntime

    folder = exports / f"{model.name}-onnx{'-int8' if int8 else ''}"
    if not folder.exists():
        with replacing_folder(folder) as empty:
            onnx.write(model, empty, int8=int8, provenance={})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    value, outputs = onnxruntime.OrtValue.ortvalue_from_numpy, [o.name for o in session.get_outputs()]
    cached = [i for i in session.get_inputs() if i.name.startswith("past_")]
    empty_cache = [value(np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)) for i in cached]

    def step(ids: np.ndarray, cache: Any) -> Any:
        cache = cache or empty_cache
        feed = {name: value(given) for name, given in inputs(ids, cache[0].shape()[2]).items()}
        feed |= {i.name: each for i, each in zip(cached, cache, strict=True)}
        return session.run_with_ort_values(outputs, feed)[1:]

    return step


def by_openvino(model: Path, exports: Path, threads: int, int8: bool, hint: str) -> Step:
    import openvino as ov

    folder = exports / f"{model.name}-openvino{'-int8' if int8 else ''}"
    if not folder.exists():
        with replacing_folder(folder) as empty:
            openvino.convert(exports / f"{model.name}-onnx", empty, int8=int8, provenance={})
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", options)
    requests = [compiled.create_infer_request() for _ in range(2)]  # the one reads what the other wrote
    cached = [i for i in compiled.inputs if i.get_any_name().startswith("past_")]
    widths = [(i.partial_shape[1].get_length(), i.partial_shape[3].get_length()) for i in cached]
    empty_cache = [ov.Tensor(np.zeros((1, heads, 0, width), np.float32)) for heads, width in widths]

    def step(ids: np.ndarray, state: Any) -> Any:
        cache, turn = state or (empty_cache, 0)
        for name, given in inputs(ids, cache[0].shape[2]).items():
            requests[turn].set_tensor(name, ov.Tensor(given))
        for i, each in zip(cached, cache, strict=True):
            requests[turn].set_tensor(i, each)
        requests[turn].infer()
        return [requests[turn].get_output_tensor(o) for o in range(1, len(compiled.outputs))], 1 - turn

    return step


ROUTES: dict[str, Callable[[Path, Path, int], Step]] = {
    "torch float32": partial(by_torch, dtype=torch.float32),
    "torch bfloat16": partial(by_torch, dtype=torch.bfloat16),
    "onnx float32": partial(by_onnx, int8=False),
    "onnx int8": partial(by_onnx, int8=True),
    "openvino float32": partial(by_openvino, int8=False, hint="f32"),
    "openvino bfloat16": partial(by_openvino, int8=False, hint="bf16"),
    "openvino int8": partial(by_openvino, int8=True, hint="f32"),
}


def tokens(step: Step, state: Any, n: int) -> None:
    """n single tokens behind a state, which may be used again: no route changes what it was given."""
    for _ in range(n):
        state = step(np.array([[100]]), state)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("exports", type=Path)
    parser.add_argument("models", type=Path, nargs="+", help="folders, the dense one first")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    asked = parser.parse_args()
    begin(asked)
    ids = np.random.default_rng(0).integers(100, 10_000, (1, asked.prompt))
    steps = {
        (route, model.name): ROUTES[route](model, asked.exports, asked.threads)
        for route in asked.routes
        for model in asked.models
    }
    first, dense = asked.routes[0], asked.models[0].name
    for what in ("prompt", "decoding"):
        runs: dict[str, Callable[[], object]] = {}
        for (route, model), step in steps.items():
            run = partial(step, ids, None) if what == "prompt" else partial(tokens, step, step(ids, None), asked.new)
            runs[f"{route}, {model}"] = run
        times = interleaved(runs, asked.rounds)
        rows = []
        for route, model in steps:
            name = f"{route}, {model}"
            scale = 1000 / (asked.new if what == "decoding" else 1)
            of_dense, of_first = (ratios(times, name, other) for other in (f"{route}, {dense}", f"{first}, {model}"))
            rows.append([route, model, shown(times[name], scale, 1), shown(of_dense), shown(of_first)])
        print_table([f"{what}: route", "model", "ms", "of dense", f"of {first}"], rows)


if __name__ == "__main__":
    main()
