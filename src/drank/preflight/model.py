"""The model's files against what is asked of them: tokens, positions, packages."""

import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drank.planning.estimate import read_model
from drank.preflight.facts import Facts, Finding

# Packages that read a tokenizer of these files alone.
TOKENIZERS = {"tokenizer.model": "sentencepiece", "*.tiktoken": "tiktoken", "tekken.json": "mistral_common"}


def sizes(facts: Facts) -> Iterator[Finding]:
    """Says what is not known before the model is here."""
    if facts.folder is None:
        yield Finding(
            "cannot say",
            f"model.source = '{facts.params.model.source}': no config.json is here yet, so disk, memory, positions "
            f"and tokens are not checked; `dvc repro raw` makes one, then `drank check --before`",
        )
    elif read_model(facts.folder) is None:
        yield Finding("cannot say", f"{facts.folder}/config.json does not tell the model's sizes: disk and memory")


def tokens(facts: Facts) -> Iterator[Finding]:
    """Needs of tasks of a tokenizer, and special tokens that have no embedding."""
    if facts.folder is None:
        return
    rolling = [task for task in facts.params.evaluation.tasks if task.endswith("_rolling") or task == "wikitext"]
    if rolling and (facts.folder / "tokenizer_config.json").is_file() and not ends(facts.tokenizer):
        yield Finding(
            "warning",
            f"evaluation.tasks: {', '.join(rolling)}: lm-eval begins a text with a begin or end token, and the "
            f"tokenizer in {facts.folder} names neither, so they will not be measured; give tokenizer_config.json one, "
            f"or take the task out",
        )
    size = facts.decoder.get("vocab_size")
    token = facts.decoder.get("bos_token_id")
    if isinstance(token, int) and isinstance(size, int) and token >= size:
        yield Finding(
            "error",
            f"{facts.folder}/config.json: bos_token_id = {token}, and embeddings end at {size - 1} (vocab_size)",
        )
    entries = facts.document("tokenizer.json")
    ids = [entry["id"] for entry in entries.get("added_tokens", ()) if isinstance(entry, dict) and "id" in entry]
    vocabulary = entries.get("model", {}).get("vocab", {})
    ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    if isinstance(size, int) and ids and max(ids) >= size:
        yield Finding(
            "warning",
            f"{facts.folder}: the tokenizer has ids up to {max(ids)}, and embeddings end at {size - 1}; a text that "
            f"contains these is refused: is the tokenizer another model's?",
        )


def ends(tokenizer: Mapping[str, Any]) -> bool:
    """True if a tokenizer has a begin or end token: named in its files, or by default of its class."""
    plain = tokenizer.get("tokenizer_class") in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    return any(tokenizer.get(key, None if plain else "default") for key in ("bos_token", "eos_token"))


def positions(facts: Facts) -> Iterator[Finding]:
    """Windows longer than the model has positions."""
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    limit = next((facts.decoder[name] for name in names if isinstance(facts.decoder.get(name), int)), None)
    if limit is None:
        return
    asked = {"sampling.window_length": facts.params.sampling.window_length}
    healed = {name: variant.healing for name, variant in facts.params.variants.items() if variant.healing}
    asked |= {f"variants.{name}.healing.window_length": healing.window_length for name, healing in healed.items()}
    turning = any(key.startswith(("rope", "rotary", "alibi")) for key in facts.decoder)
    for key, length in asked.items():
        if length > limit:
            why = "it was not trained beyond them" if turning else "it has no others"
            yield Finding(
                "warning" if turning else "error",
                f"{key} = {length}: the model has {limit} positions, and {why}; give {limit} or fewer",
            )


def lengths(facts: Facts) -> Iterator[Finding]:
    """Windows to heal on that are longer than the calibration text: a token has a byte or more."""
    params = facts.params
    scheme, _, name = params.text[params.sampling.calibration_text].source.partition(":")
    file = facts.root / Path(name).expanduser()
    if scheme != "local" or file.suffix not in (".csv", ".json", ".jsonl", ".txt") or not file.is_file():
        return
    for variant, healing in ((name, variant.healing) for name, variant in params.variants.items()):
        if healing and healing.window_length > file.stat().st_size:
            yield Finding(
                "error",
                f"variants.{variant}.healing.window_length = {healing.window_length}: {file} has "
                f"{file.stat().st_size} bytes, and so fewer tokens",
            )


def packages(facts: Facts) -> Iterator[Finding]:
    """Optional packages that will be imported, and a GPU that is asked for."""
    needed: dict[str, str] = {}
    if facts.folder and not (facts.folder / "tokenizer.json").is_file():
        needed = {package: pattern for pattern, package in TOKENIZERS.items() if any(facts.folder.glob(pattern))}
    if any(text.source.startswith("hub:") for text in facts.params.text.values()):
        needed["datasets"] = "hub: texts"
    if facts.params.model.source.endswith(".gguf") or (facts.params.model.member or "").endswith(".gguf"):
        needed["gguf"] = "a GGUF file"
    for package, what in needed.items():
        if find_spec(package) is None:
            yield Finding("error", f"package {package} is not installed, and {what} needs it; `pip install {package}`")
    params = facts.params
    sections: dict[str, Any] = {"covariance": params.covariance, "evaluation": params.evaluation}
    sections |= {f"variants.{name}.healing": variant.healing for name, variant in params.variants.items()}
    asked = [f"{name}.device" for name, section in sections.items() if section and section.device == "cuda"]
    if not asked:
        return
    torch = find_spec("torch")
    told = Path(torch.origin).with_name("version.py").read_text() if torch and torch.origin else ""
    if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))):
        yield Finding("error", f"{', '.join(asked)} = cuda, and there is no GPU here (no /dev/nvidiactl); give cpu")
    elif not re.search(r"^(cuda|hip)\b[^=]*= *['\"]", told, re.MULTILINE):
        yield Finding("error", f"{', '.join(asked)} = cuda, and torch is a build for CPUs: install one for your GPU")
