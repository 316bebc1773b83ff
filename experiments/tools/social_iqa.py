"""``python -m experiments.tools.social_iqa FOLDER ...``: zero-shot accuracy on Social IQa (arXiv:1904.09728) of models.

The items are those of BIG-bench, out of its sdist, 358 MB, which pip fetches once. A task of no pipeline: a stage that
knew it would make every lock stale for a download that few want.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from drank.project.command import run_stage
from drank.project.params import TextSource
from drank.project.sources import file_of

SOURCE = TextSource(
    source="pypi:bigbench==1.0.0",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    member="bigbench-1.0.0/bigbench/benchmark_tasks/social_iqa/task.json",
)
TASK = "next_sentence"  # the name of the pipeline's task that has such items: the likeliest of several continuations


def items(downloads: Path, n_items: int) -> list[dict[str, Any]]:
    """The first items, ``{context, choices, label}``: a situation with a question, and three answers."""
    with file_of(SOURCE, downloads, Path()) as file:
        examples = json.loads(file.read_text(encoding="utf-8"))["examples"]
    return list(_items(examples[:n_items]))


def _items(examples: list[Any]) -> Iterator[dict[str, Any]]:
    for example in examples:
        scores = example["target_scores"]
        yield {"context": example["input"], "choices": list(scores), "label": list(scores.values()).index(1)}


def main(
    folders: Annotated[list[Path], typer.Argument(help="Folders of models, compressed or not.")],
    n_items: Annotated[int, typer.Option(help="Items, the first ones of 1954.")] = 1954,
    batch: Annotated[int, typer.Option(help="Answers per forward pass.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    downloads: Annotated[Path, typer.Option(help="Where the sdist lies, or is put.")] = Path("data/downloads"),
) -> None:
    """Print accuracy and accuracy by length-normalised likelihood, with standard errors, per folder."""
    from drank.model.saved import load
    from drank.project.processes import process_group
    from drank.steps.evaluation import load_tasks, run_tasks

    asked = items(downloads, n_items)
    with process_group(threads, "cpu") as group:
        for folder in folders:
            saved = load(folder, "auto", "cpu", group.gather)
            tasks = load_tasks({TASK: asked}, [TASK], saved.tokenizer)
            figures = run_tasks(saved.model, saved.tokenizer, tasks, batch)
            shown = [
                f"{key} {figures[f'{key}/{TASK}']:.3f} +- {figures[f'{key}_stderr/{TASK}']:.3f}"
                for key in ("acc", "acc_norm")
            ]
            typer.echo(f"{folder}: {len(asked)} items, {', '.join(shown)}")


if __name__ == "__main__":
    run_stage(main)
