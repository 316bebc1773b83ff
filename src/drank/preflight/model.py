"""The model's files against what is asked of them: tokens, positions, packages."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drank.planning.estimate import read_model
from drank.preflight.facts import Facts, Finding, Findings

TOKENIZERS = {"*.tiktoken": "tiktoken", "tekken.json": "mistral_common"}  # optional packages, by what they read


def sizes(facts: Facts) -> Findings:
    """Says what is not known before the model is here."""
    if facts.folder is None:
        yield Finding(
            "cannot say",
            f"model.source = '{facts.params.model.source}': no config.json is here yet, so disk, memory, positions "
            f"and tokens are not checked; `dvc repro raw` makes one, then `drank check --before`",
        )
    elif read_model(facts.folder) is None:
        yield "cannot say", f"{facts.folder}/config.json does not tell the model's sizes: disk and memory"


def tokens(facts: Facts) -> Findings:
    """Needs of tasks of a tokenizer, and special tokens that have no embedding."""
    if facts.folder is None:
        return
    rolling = [task for task in facts.params.evaluation.tasks if task.endswith("_rolling") or task == "wikitext"]
    # Some classes of tokenizers have tokens that their files do not name.
    plain = facts.tokenizer.get("tokenizer_class") in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    ends = any(facts.tokenizer.get(key, None if plain else "default") for key in ("bos_token", "eos_token"))
    if rolling and (facts.folder / "tokenizer_config.json").is_file() and not ends:
        yield Finding(
            "warning",
            f"evaluation.tasks: {', '.join(rolling)}: lm-eval begins a text with a begin or end token, and the "
            f"tokenizer in {facts.folder} names neither, so they will not be measured; give tokenizer_config.json one, "
            f"or take the task out",
        )
    size = facts.decoder.get("vocab_size")
    for key in ("pad_token_id", "bos_token_id"):
        token = facts.decoder.get(key)
        if isinstance(token, int) and isinstance(size, int) and token >= size:
            yield "error", f"{facts.folder}/config.json: {key} = {token}, and embeddings end at {size - 1} (vocab_size)"
    entries = facts.document("tokenizer.json")
    ids = [entry["id"] for entry in entries.get("added_tokens", ())]
    vocabulary = entries.get("model", {}).get("vocab", {})
    ids += vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    if isinstance(size, int) and ids and max(ids) >= size:
        yield Finding(
            "warning",
            f"{facts.folder}: the tokenizer has ids up to {max(ids)}, and embeddings end at {size - 1}; a text that "
            f"contains these is refused: is the tokenizer another model's?",
        )


def positions(facts: Facts) -> Findings:
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


def packages(facts: Facts) -> Findings:
    """Packages that a tokenizer without tokenizer.json needs, and a GPU that is asked for."""
    for pattern, package in TOKENIZERS.items():
        alone = facts.folder and any(facts.folder.glob(pattern)) and not (facts.folder / "tokenizer.json").is_file()
        if alone and find_spec(package) is None:
            yield "error", f"{package} is not installed, and {pattern} needs it; `pip install {package}`"
    params = facts.params
    sections: dict[str, Any] = {"covariance": params.covariance, "evaluation": params.evaluation}
    sections |= {f"variants.{name}.healing": variant.healing for name, variant in params.variants.items()}
    asked = [f"{name}.device" for name, section in sections.items() if section and section.device == "cuda"]
    if asked and not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")):
        yield "error", f"{', '.join(asked)} = cuda, and there is no GPU here (no /dev/nvidiactl); give cpu"
