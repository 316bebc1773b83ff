"""Facts that checks look at, and their findings."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from drank.planning.estimate import Cost, costs, read_model, read_test_windows
from drank.project.dvc import LockError, read_lock
from drank.project.params import Params

Level = Literal["error", "warning", "cannot say", "remark"]


class Finding(NamedTuple):
    """One sentence: the key of params.yaml or the place, its value, the rule, the fix."""

    level: Level  # an error ends `drank run` before it begins
    text: str


Findings = Iterator[tuple[Level, str]]


@dataclass(frozen=True)
class Facts:
    """The project as checks see it: the project's parameters and, as far as they are at hand, its model's files."""

    root: Path
    params: Params

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
        if self.fetched.get("model") == self.params.model.source:
            folder: Path | None = self.root / "data/raw/model"
        elif scheme == "local":
            folder = self.root / Path(name).expanduser()
        else:
            folder = cached_snapshot("models", name) if scheme == "hub" else None
        return folder if folder is not None and (folder / "config.json").is_file() else None

    @cached_property
    def decoder(self) -> Mapping[str, Any]:
        """The part of config.json that speaks of text."""
        config = self.document("config.json")
        return config.get("text_config", config)

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
        outs = {name: name.replace("release@", "models@").replace("@", "/") for name in found}
        return {name: cost for name, cost in found.items() if not (self.root / "data" / outs[name]).exists()}

    def document(self, name: str) -> dict[str, Any]:
        """A JSON file of the model's folder; empty where there is none."""
        file = (self.folder or Path()) / name
        return json.loads(file.read_bytes()) if self.folder and file.is_file() else {}


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
