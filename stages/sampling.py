"""data/sampling/: calibration windows, test windows and offline task items, from raw texts and a tokenizer."""

import json
from pathlib import Path
from typing import Any

from drank import sampling
from drank.workflow.files import replacing_folder, write_json, write_tensors, write_text
from drank.workflow.params import read_params
from drank.workflow.stage import run_stage


def main(root: Path = Path()) -> None:
    from transformers import AutoTokenizer

    params = read_params(root / "params.yaml")
    asked, seed = params.sampling, params.sampling.seed
    tokenizer = AutoTokenizer.from_pretrained(root / "data/raw/model")
    begin = sampling.begin_token(tokenizer)
    calibration, tests, texts = {}, {}, {}
    tasks: dict[str, list[Any]] = {}
    for name in params.text:
        documents = read_column(root / f"data/raw/text/{name}.jsonl", "text")
        cleaned = sampling.clean(documents)
        texts[name] = {"documents": len(documents), "empty_or_repeated": len(documents) - len(cleaned)}
        if name == asked.calibration_text:
            calibrated, held_out = sampling.split_documents(cleaned, asked.held_out_share, seed)
            stream = sampling.token_stream(calibrated, tokenizer)
            texts[name] |= {"calibration_documents": len(calibrated), "calibration_tokens": len(stream)}
            for drawn in asked.calibration_seeds:
                calibration[str(drawn)] = sampling.draw_windows(
                    stream, asked.n_windows, asked.window_length, drawn, begin
                )
            tasks["last_word"] = sampling.last_word_items(held_out, asked.n_task_items, seed)
            tasks["next_sentence"] = sampling.next_sentence_items(held_out, asked.n_task_items, seed)
        else:
            held_out = sampling.shuffled(cleaned, seed)
        stream = sampling.token_stream(held_out, tokenizer)
        texts[name] |= {"test_documents": len(held_out), "test_tokens": len(stream)}
        tests[name] = sampling.consecutive_windows(stream, asked.n_test_windows, asked.window_length, begin)
        tasks[f"{name}_rolling"] = sampling.rolling_items(held_out)

    with replacing_folder(root / "data/sampling") as folder:
        for name, windows in calibration.items():
            write_tensors(folder / f"calibration/{name}.safetensors", {"windows": windows})
        write_tensors(folder / "test.safetensors", tests)
        for name, items in tasks.items():
            write_text(folder / f"tasks/{name}.jsonl", json_lines(items))
        counts = {name: len(items) for name, items in tasks.items()}
        write_json(
            folder / "summary.json",
            asked.model_dump() | {"begin_token": begin, "texts": texts, "task_items": counts},
        )


def read_column(path: Path, column: str) -> list[Any]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[column] for line in lines]


def json_lines(items: list[Any]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in items)


if __name__ == "__main__":
    run_stage(main)
