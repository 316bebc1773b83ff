"""``python -m experiments.tools.copies``: dvc.yaml of study/ and of studies in experiments/, from the top-level one."""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from drank.cli.options import Root
from drank.project.command import run_stage
from drank.project.files import write_text

FOLDER = "experiments"
STUDIES = ("healing", "precision", "texts")
NOT_SHIPPED = ("release",)  # a stage that only adds what travels with a model
MADE = "# The top-level stages over the files of this folder, written by `python -m experiments.tools.copies`.\n"


def main(root: Root = Path()) -> None:
    """Write study/dvc.yaml, and experiments/<name>/{dvc,params}.yaml of the studies there."""
    copy_pipeline(root, "study")
    for name in STUDIES:
        prepare(root, name)


def prepare(root: Path, name: str) -> str:
    """Write params.yaml and dvc.yaml of the experiment's own root, ``experiments/<name>``. Returns that folder."""
    folder = f"{FOLDER}/{name}"
    write_text(root / folder / "params.yaml", (root / FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    copy_pipeline(root, folder)
    return folder


def copy_pipeline(root: Path, folder: str) -> None:
    """Write a folder's dvc.yaml: the same code over other data. Stages still run from the root, with --root folder."""
    main = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    moved = yaml.safe_dump(pipeline_in(main, folder), sort_keys=False, allow_unicode=True, width=120)
    write_text(root / folder / "dvc.yaml", MADE + moved)


def pipeline_in(pipeline: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The document of such a dvc.yaml; ``pipeline`` is the top-level one's, ``folder`` a path relative to it."""
    kept = {name: stage for name, stage in pipeline["stages"].items() if name not in NOT_SHIPPED}
    return {"stages": {name: _stage_in(stage, folder) for name, stage in kept.items()}}


def _stage_in(stage: Mapping[str, Any], folder: str) -> dict[str, Any]:
    if "do" in stage:
        return {**stage, "do": _stage_in(stage["do"], folder)}
    changed: dict[str, Any] = {"cmd": f"{stage['cmd']} --root {folder}", "wdir": posixpath.relpath(".", folder)}
    for key, value in stage.items():
        if key in ("deps", "outs", "metrics", "plots"):
            changed[key] = [_path_in(entry, folder) for entry in value]
        elif key == "params":
            own = [entry for entry in value if isinstance(entry, str)]
            changed[key] = [
                *([{f"{folder}/params.yaml": own}] if own else []),
                *(entry for entry in value if not isinstance(entry, str)),
            ]
    return {**stage, **changed}


def _path_in(entry: str | Mapping[str, Any], folder: str) -> str | dict[str, Any]:
    if not isinstance(entry, str):
        return {str(_path_in(path, folder)): options for path, options in entry.items()}
    return f"{folder}/{entry}" if entry.startswith(("data/", "results/")) else entry


if __name__ == "__main__":
    run_stage(main)
