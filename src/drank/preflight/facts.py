"""Facts that checks look at, and their findings."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from drank.planning.estimate import Cost, costs, read_model, read_test_windows
from drank.project.dvc import LockError, read_lock
from drank.project.params import Params, read_params

Level = Literal["error", "warning", "cannot say", "remark"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found, in one sentence: the key of params.yaml or the place, its value, the rule, the fix.

    Attributes:
        level: an ``error`` ends `drank run` before it begins; what a check ``cannot say`` is counted beside the others.
    """

    level: Level
    text: str


@dataclass(frozen=True)
class Facts:
    """The project as checks see it: its parameters and, as far as they are at hand, its model's files."""

    root: Path

    @cached_property
    def params(self) -> Params:
        return read_params(self.root / "params.yaml")

    @cached_property
    def fetched(self) -> dict[str, str]:
        """Sources by name, ``model`` or ``text.<name>``, of what the ``raw`` stage left; empty if it left nothing."""
        if not (self.root / "data/raw/model").is_dir():
            return {}
        try:
            sections = read_lock(self.root / "dvc.lock")["raw"]["params"]["params.yaml"]
            texts = {f"text.{name}": text["source"] for name, text in sections["text"].items()}
            return {"model": sections["model"]["source"]} | texts
        except (LockError, KeyError, TypeError, AttributeError):
            return {}

    @property
    def sources(self) -> dict[str, str]:
        """The same of params.yaml."""
        texts = {f"text.{name}": text.source for name, text in self.params.text.items()}
        return {"model": self.params.model.source} | texts

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
    def tokenizer(self) -> Mapping[str, Any]:
        return self.document("special_tokens_map.json") | self.document("tokenizer_config.json")

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """By stage, without those whose output is there; empty where the model's sizes are not known."""
        model = read_model(self.folder) if self.folder else None
        if model is None:
            return {}
        found = costs(self.params, model, read_test_windows(self.params, self.root))
        return {name: cost for name, cost in found.items() if not (self.root / out_of(name)).exists()}

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the model's folder; empty where there is none."""
        try:
            document = json.loads(((self.folder or Path()) / name).read_bytes()) if self.folder else {}
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}


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
