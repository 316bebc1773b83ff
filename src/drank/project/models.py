"""Fetching a model: from its source to a plain Hugging Face folder in bfloat16. Neither pickles nor code are loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from drank.project.files import read_json, replacing_folder
from drank.project.params import ModelSource
from drank.project.sources import SourceError, advise_pin, file_of, hub_name, scheme_of, told

log = logging.getLogger(__name__)

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Folders inside a repository hold other formats of the same weights, and so do consolidated files (Mistral's).
HUB_COPIES = ["*/*", "consolidated*.safetensors"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fetch_model(asked: ModelSource, destination: Path, downloads: Path, root: Path = Path()) -> None:
    """Write a causal language model as a plain Hugging Face folder: config, bfloat16 safetensors, tokenizer.

    A GGUF file is dequantised. Equal sources give equal bytes, given the versions of torch and transformers.

    Arguments:
        destination: the folder to write; it is replaced as a whole, and left alone when anything fails.
        downloads, root: as in ``file_of``.

    Raises:
        SourceError: the source cannot be had, is not what it should be, or needs pickles or remote code.
        FileError: the folder's config.json is damaged.
    """
    if scheme_of(asked) == "hub":
        _save_plain(asked.source, _hub_folder(asked.source), destination)
        return
    with file_of(asked, downloads, root) as path:
        _save_plain(asked.source, path, destination)


def _hub_folder(source: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_name(source) as (name, revision):
        folder = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES)
    advise_pin(source, commit=Path(folder).name)
    return Path(folder)


def _save_plain(source: str, path: Path, destination: Path) -> None:
    import torch

    if path.is_dir():
        _check_folder(source, path)
        model, tokenizer = _load(source, path, {"dtype": torch.bfloat16, "use_safetensors": True}, {})
    elif path.suffix == ".gguf":
        model, tokenizer = _load_gguf(source, path)
    else:
        raise SourceError(f"{source}: '{path.name}' is no model; that is a folder with safetensors, or a .gguf file")
    with replacing_folder(destination) as plain:
        model.to(torch.bfloat16).save_pretrained(plain)
        tokenizer.save_pretrained(plain)
    log.info("%s: %d parameters", source, model.num_parameters())


def _check_folder(source: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{source}: no config.json, so not the folder of a model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        has = f"only pickles ({', '.join(pickles)}), which run code when loaded" if pickles else "no weights"
        raise SourceError(f"{source}: has {has}; a model needs *.safetensors")
    if compressed := read_json(folder / "config.json").get("quantization_config"):
        method = compressed.get("quant_method", "method not named")
        raise SourceError(f"{source}: its weights are compressed already ({method}); name the model it was made of")


def _load_gguf(source: str, file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import GgufConfig

    # float32, so that a dequantised weight is rounded once, to bfloat16, when it is saved.
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with _read_once():
        return _load(source, file.parent, options, {"gguf_file": file.name})


@contextmanager
def _read_once() -> Iterator[None]:
    """A GGUF file is parsed once in the block, and from memory; the names of its tensors are made once.

    transformers parses it for the configuration, for the weights and for the tokenizer, seconds each: the vocabulary is
    read word by word, every word in slices of a memory map, which NumPy makes far slower than those of an array. It
    makes the map of all names anew for every module of the model.
    """
    import gguf
    import numpy as np

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patch.object(np, "memmap", lambda path, *_, **__: np.fromfile(path, np.uint8)),
    ):
        yield


def _load(source: str, folder: Path, options: dict[str, Any], common: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer; nothing is fetched, no code of the folder runs, and no weight is left random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"local_files_only": True, "trust_remote_code": False, **common}
    with told(f"{source}: cannot be loaded as a causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **common)
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{source}: {len(missing)} weights are missing and would be random: {missing[0]}, ...")
    return model, tokenizer
