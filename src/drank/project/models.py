"""Fetching a model: from its source to a plain Hugging Face folder in bfloat16. Neither pickles nor code are loaded."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from drank.project.files import read_json, replacing_folder
from drank.project.params import ModelSource
from drank.project.refusals import check_access
from drank.project.sources import SourceError, advise_pin, file_of, hub_name, scheme_of, told

log = logging.getLogger(__name__)

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Folders inside a repository hold other formats of the same weights, and so do consolidated files (Mistral's).
HUB_COPIES = ["*/*", "consolidated*.safetensors"]
MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as Model; '
    "Model.from_pretrained('ADAPTER').merge_and_unload().save_pretrained('MERGED')\""
)


def fetch_model(
    asked: ModelSource,
    destination: Path,
    downloads: Path,
    root: Path = Path(),
    change: Callable[[Any], None] | None = None,
) -> None:
    """Write a causal language model as a plain Hugging Face folder: config, bfloat16 safetensors, tokenizer.

    A GGUF file is dequantised. Equal sources give equal bytes, given the versions of torch and transformers.

    Arguments:
        destination: the folder to write; it is replaced as a whole, and left alone when anything fails.
        downloads, root: as in ``file_of``.
        change: what is done to the model before it is rounded to bfloat16; it is loaded in float32 then.

    Raises:
        SourceError: the source cannot be had, is not what it should be, or needs pickles or remote code.
        FileError: the folder's config.json is damaged, or a file is a pointer of Git LFS.
    """
    from huggingface_hub import snapshot_download

    if scheme_of(asked) == "hub":
        with hub_name(asked.source) as (name, revision):
            folder = snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES)
        advise_pin(asked.source, commit=Path(folder).name)
        _save_plain(asked.source, Path(folder), destination, change)
    else:
        with file_of(asked, downloads, root) as path:
            _save_plain(asked.source, path, destination, change)


def _save_plain(source: str, path: Path, destination: Path, change: Callable[[Any], None] | None) -> None:
    import torch

    if path.is_dir():
        check_folder(source, path)
        dtype = torch.float32 if change else torch.bfloat16
        model, tokenizer = _load(source, path, {"dtype": dtype, "use_safetensors": True}, {})
    elif path.suffix == ".gguf":
        check_access(path)  # a member of a wheel that was packed from pointers
        model, tokenizer = _load_gguf(source, path)
    else:
        raise SourceError(f"{source}: '{path.name}' is no model; that is a folder with safetensors, or a .gguf file")
    if change:
        change(model)
    with replacing_folder(destination) as plain:
        model.to(torch.bfloat16).save_pretrained(plain)
        # Later steps copy and hash the files of this folder; several chat templates would be a folder in it.
        several = isinstance(getattr(tokenizer, "chat_template", None), dict)
        tokenizer.save_pretrained(plain, **({"save_jinja_files": False} if several else {}))
    log.info("%s: %d parameters", source, model.num_parameters())


def check_folder(source: str, folder: Path) -> None:
    """Refuse what files tell to be no plain model, before anything heavy is imported.

    Raises:
        SourceError, FileError: as ``fetch_model``.
    """
    for file in filter(Path.is_file, sorted(folder.iterdir())):
        check_access(file)
    if (folder / "adapter_config.json").is_file():  # transformers would load the model that it names
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise SourceError(
            f"{source}: a peft adapter of {base}; merge it first, and save the tokenizer beside it: {MERGE} (or remove "
            f"adapter_config.json if the weights are merged already)"
        )
    if not (folder / "config.json").is_file():
        raise SourceError(f"{source}: no config.json, so not the folder of a model")
    if not any(folder.glob("*.safetensors")):
        raise SourceError(
            f"{source}: has no *.safetensors; weights in pickles (*.bin, *.pt) would run code when loaded"
        )
    config = read_json(folder / "config.json")
    if compressed := config.get("quantization_config"):
        method = compressed.get("quant_method", "method not named")
        raise SourceError(f"{source}: its weights are compressed already ({method}); name the model it was made of")
    for section in (config, config.get("text_config") or {}):
        n_tokens, padding = section.get("vocab_size"), section.get("pad_token_id")
        if isinstance(n_tokens, int) and isinstance(padding, int) and padding >= n_tokens:
            raise SourceError(
                f"{source}: config.json: pad_token_id = {padding} is no token: vocab_size is {n_tokens}; write the id "
                f"of the end token there, or null"
            )


def _load_gguf(source: str, file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import GgufConfig

    # float32, so that a dequantised weight is rounded once, to bfloat16, when it is saved.
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with _read_once():
        model, tokenizer = _load(source, file.parent, options, {"gguf_file": file.name})
        _check_biases(source, file, model)
    return model, tokenizer


def _check_biases(source: str, file: Path, model: Any) -> None:
    """Refuse a GGUF file with biases that the model has no place for; transformers leaves them out and says nothing."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[reader.fields["general.architecture"].contents()]
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    known = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    tensors = [tensor.name for tensor in reader.tensors if tensor.name.removesuffix(".bias") + ".weight" in known]
    _refuse_lost(source, set(tensors) - known, model)


def _refuse_lost(source: str, lost: set[str], model: Any) -> None:
    if lost:
        raise SourceError(
            f"{source}: {len(lost)} weights have no place in {type(model).__name__} and would be lost: {min(lost)}, "
            f"...; is config.json that of these weights?"
        )


@contextmanager
def _read_once() -> Iterator[None]:
    """A GGUF file is parsed once in the block, from an array; the names of its tensors are made once.

    transformers parses it for the configuration, for the weights and for the tokenizer, seconds each, and makes the map
    of all names anew for every module of the model.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            # NumPy slices a memory map far slower than an array, and a vocabulary is read word by word.
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, value in (own | {"GGUFReader": Reader}).items():
        setattr(gguf, name, cache(value))
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(gguf, name, value)


def _load(source: str, folder: Path, options: dict[str, Any], common: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer; nothing is fetched, no code of the folder runs, and no weight is left random."""
    from transformers import AutoModelForCausalLM

    common = {"local_files_only": True, "trust_remote_code": False, **common}
    with told(f"{source}: cannot be loaded as a causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **common)
        tokenizer = _load_tokenizer(source, folder, common)
    lost = set(report["unexpected_keys"])
    if any("lora_" in name for name in lost):
        raise SourceError(f"{source}: the weights of a peft adapter beside its model's; merge it first: {MERGE}")
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{source}: {len(missing)} weights are missing and would be random: {missing[0]}, ...")
    _refuse_lost(source, lost, model)
    _check_special_tokens(source, tokenizer, model.get_input_embeddings().weight.shape[0])
    return model, tokenizer


def _load_tokenizer(source: str, folder: Path, common: dict[str, Any]) -> Any:
    """The tokenizer; one that is only ``tokenizer.model`` is converted, and compared with sentencepiece itself."""
    from transformers import AutoTokenizer, LlamaTokenizer

    model = folder / "tokenizer.model"
    if "gguf_file" in common or not model.is_file() or (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, **common)
    from sentencepiece import SentencePieceProcessor

    real = SentencePieceProcessor(model_file=str(model))
    pieces = [real.id_to_piece(number).lstrip("▁") for number in range(0, len(real), len(real) // 1000 + 1)]
    probe = "Two words, 2 numbers: 34. " + " ".join(piece for piece in pieces if piece.isascii() and piece.isalpha())
    for kind in (AutoTokenizer, LlamaTokenizer):  # without tokenizer_config.json, the first loses the leading space
        tokenizer = kind.from_pretrained(folder, **common)
        if tokenizer.encode(probe, add_special_tokens=False) == real.encode(probe):
            return tokenizer
    raise SourceError(
        f"{source}: transformers makes another tokenizer of tokenizer.model than sentencepiece does; save it as "
        f"tokenizer.json"
    )


def _check_special_tokens(source: str, tokenizer: Any, n_tokens: int) -> None:
    for key in ("bos_token", "eos_token"):  # those that are used; some tokenizers add others beyond the embeddings
        number = getattr(tokenizer, f"{key}_id")
        if number is not None and number >= n_tokens:
            raise SourceError(
                f"{source}: {key} = '{getattr(tokenizer, key)}' of the tokenizer is token {number}, and the model has "
                f"{n_tokens}; resize its embeddings (resize_token_embeddings), or name another token in "
                f"tokenizer_config.json"
            )
