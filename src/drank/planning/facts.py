"""A project as plans and checks see it: its parameters, its model's files, the cost of its stages."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drank.planning.estimate import Cost, costs, read_model, read_test_windows
from drank.project.dvc import LockError, read_lock
from drank.project.params import Params, read_params


@dataclass(frozen=True)
class Facts:
    """A project: its parameters and, as far as they are at hand, its model's files."""

    root: Path
    given: Params | None = None

    @cached_property
    def params(self) -> Params:
        """The given parameters, or those of params.yaml."""
        return self.given or read_params(self.root / "params.yaml")

    @cached_property
    def fetched(self) -> dict[str, str]:
        """Sources by name, ``model`` or ``text.<name>``, of what the ``raw`` stage left; empty if it left nothing."""
        if not (self.root / "data/raw/model").is_dir():
            return {}
        try:
            return sources_of(read_lock(self.root / "dvc.lock")["raw"]["params"]["params.yaml"])
        except (LockError, KeyError, TypeError, AttributeError):
            return {}

    @property
    def sources(self) -> dict[str, str]:
        """Sources by name, as params.yaml has them."""
        return sources_of(self.params.model_dump())

    @cached_property
    def folder(self) -> Path | None:
        """The model's folder: as ``raw`` wrote it, as ``local:`` names it, or in the cache of the Hugging Face hub."""
        scheme, _, name = self.params.model.source.partition(":")
        folder: Path | None = None
        if self.fetched.get("model") == self.params.model.source:
            folder = self.root / "data/raw/model"
        elif scheme == "local":
            folder = self.root / Path(name).expanduser()
        elif scheme == "hub":
            folder = cached_snapshot("models", name)
        return folder if folder is not None and (folder / "config.json").is_file() else None

    @cached_property
    def decoder(self) -> Mapping[str, Any]:
        """The part of config.json that speaks of text."""
        config = self.document("config.json")
        inner = config.get("text_config")
        return inner if isinstance(inner, dict) else config

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Costs by stage; empty where the model's sizes are not known."""
        model = read_model(self.folder) if self.folder else None
        return costs(self.params, model, read_test_windows(self.params, self.root)) if model else {}

    @property
    def left(self) -> dict[str, Cost]:
        """Costs of the stages whose output is missing."""
        return {name: cost for name, cost in self.costs.items() if not (self.root / out_of(name)).exists()}

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the model's folder; empty where there is none."""
        try:
            document = json.loads(((self.folder or Path()) / name).read_bytes()) if self.folder else {}
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}


def sources_of(document: Mapping[str, Any]) -> dict[str, str]:
    return {"model": document["model"]["source"]} | {f"text.{k}": v["source"] for k, v in document["text"].items()}


def out_of(stage: str) -> str:
    """The folder that a stage writes."""
    step, _, item = stage.partition("@")
    return f"data/models/{item}" if step == "release" else f"data/{step}/{item}"


def cached_snapshot(kind: str, name: str) -> Path | None:
    """The newest snapshot that the cache of the Hugging Face hub has of ``org/name@revision``; None without one."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    name, _, revision = name.partition("@")
    folder = cache / f"{kind}--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        revision = reference.read_text().strip()
    found = sorted((folder / "snapshots").glob(revision or "*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def offline() -> bool:
    """True if the Hugging Face hub must not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
