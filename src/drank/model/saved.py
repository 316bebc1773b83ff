"""A saved model as it is measured. Compressed folders load too, since the quantizer is imported."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import drank.model.quantizer  # noqa: F401  registers the format
from drank.model.precision import agreed_dtype, load_model

CURVE = "healing.json"  # the loss by step, in the folder of a healed model


@dataclass(frozen=True)
class Saved:
    """A model with its tokenizer, the bytes of its weights on disk and, where it was healed, the loss by step."""

    model: Any
    tokenizer: Any
    n_bytes: int = 0
    loss_curve: Any = None


def load(folder: Path, dtype: str, device: str, gather: Callable[[str], list[str]]) -> Saved:
    """The model of a folder on a device, for passes in a type that ``agreed_dtype`` chooses."""
    return Saved(
        load_model(folder, agreed_dtype(dtype, device, gather), device),
        AutoTokenizer.from_pretrained(folder),
        sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        json.loads((folder / CURVE).read_text(encoding="utf-8")) if (folder / CURVE).is_file() else None,
    )
