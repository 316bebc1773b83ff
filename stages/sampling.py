"""data/sampling/: calibration windows, test windows and offline task items, from raw texts and a tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import replacing_folder, write_json, write_tensors, write_text
from drank.project.params import read_params
from drank.steps import sampling


def main(root: Path = Path()) -> None:
    from transformers import AutoTokenizer

    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    asked, seed = params.sampling, params.sampling.seed
    tokenizer = AutoTokenizer.from_pretrained(inputs / "data/raw/model")
    begin = sampling.begin_token(tokenizer)
    calibration_begin, test_begin = asked.calibration_begin or "window", asked.test_begin or "window"
    calibration, tests, last_windows, texts = {}, {}, {}, {}
    tasks: dict[str, list[Any]] = {}
    for name in params.text:
        documents = read_column(inputs / f"data/raw/text/{name}.jsonl", "text")
        cleaned = documents if asked.documents == "unchanged" else sampling.clean(documents)
        texts[name] = {"documents": len(documents), "empty_or_repeated": len(documents) - len(cleaned)}
        if name == asked.calibration_text:
            calibrated, held_out = split(cleaned, asked.held_out_share, seed)
            calibrated = calibrated[: asked.calibration_documents]
            stream = sampling.token_stream(calibrated, tokenizer, calibration_begin)
            calibration_text = stream.int()
            texts[name] |= {"calibration_documents": len(calibrated), "calibration_tokens": len(stream)}
            draw = sampling.draw_consecutive_windows if asked.calibration_draw == "windows" else sampling.draw_windows
            first = begin if calibration_begin == "window" else None
            with naming(name):
                for drawn in asked.calibration_seeds:
                    calibration[str(drawn)] = draw(stream, asked.n_windows, asked.window_length, drawn, first)
            if held_out and asked.n_task_items:
                tasks["last_word"] = sampling.last_word_items(held_out, asked.n_task_items, seed)
                tasks["next_sentence"] = sampling.next_sentence_items(held_out, asked.n_task_items, seed)
        else:
            held_out = cleaned if asked.documents == "unchanged" else sampling.shuffled(cleaned, seed)
        if not held_out:
            continue
        stream = sampling.token_stream(held_out, tokenizer, test_begin)
        texts[name] |= {"test_documents": len(held_out), "test_tokens": len(stream)}
        first = begin if test_begin == "window" else None
        n_windows = asked.n_test_windows if isinstance(asked.n_test_windows, int) else None
        with naming(name):
            tests[name] = sampling.consecutive_windows(stream, n_windows, asked.window_length, first)
        last = sampling.short_last_window(stream, asked.window_length, first)
        if asked.n_test_windows == "all" and last is not None:
            last_windows[name] = last
        tasks[f"{name}_rolling"] = sampling.rolling_items([text for text in held_out if text.strip()])

    with replacing_folder(root / "data/sampling") as folder:
        for name, windows in calibration.items():
            write_tensors(folder / f"calibration/{name}.safetensors", {"windows": windows})
        write_tensors(folder / "calibration_text.safetensors", {"tokens": calibration_text})
        write_tensors(folder / "test.safetensors", tests)
        if last_windows:
            write_tensors(folder / "last.safetensors", last_windows)
        for name, items in tasks.items():
            write_text(folder / f"tasks/{name}.jsonl", json_lines(items))
        counts = {name: len(items) for name, items in tasks.items()}
        write_json(
            folder / "summary.json",
            asked.model_dump(exclude_none=True) | {"begin_token": begin, "texts": texts, "task_items": counts},
        )


@contextmanager
def naming(text: str) -> Iterator[None]:
    """What is wrong with a text is told with its name."""
    try:
        yield
    except sampling.SamplingError as error:
        raise sampling.SamplingError(f"text.{text}: {error}") from None


def split(documents: list[str], held_out_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents to calibrate on and to test on; with share 0 all are calibrated on, in their order."""
    return sampling.split_documents(documents, held_out_share, seed) if held_out_share else (documents, [])


def read_column(path: Path, column: str) -> list[Any]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[column] for line in lines]


def json_lines(items: list[Any]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items)


if __name__ == "__main__":
    run_stage(main)
