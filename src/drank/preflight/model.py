"""The sources, and the model's files against what is asked of them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drank.planning.estimate import read_model
from drank.planning.facts import Facts, cached_snapshot, offline
from drank.preflight.finding import Finding
from drank.project.files import FileError
from drank.project.models import check_folder
from drank.project.refusals import check_access
from drank.project.sources import SourceError
from drank.project.texts import check_beginning

EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # names that architectures have for it


def sources(facts: Facts) -> Iterator[Finding]:
    """Sources that the stage ``raw`` will refuse, in its words, or that the network is needed for."""
    if facts.fetched == facts.sources:
        return
    for section, source in facts.sources.items():
        key, (scheme, _, name) = f"{section}.source = '{source}'", source.partition(":")
        path = facts.root / Path(name).expanduser() if scheme == "local" else None
        if scheme == "hub":
            path = cached_snapshot("models" if section == "model" else "datasets", name)
        if path is None:
            if scheme == "hub" and offline():
                yield Finding("error", f"{key} is not in the cache of the hub; HF_HUB_OFFLINE is set: unset it")
            elif scheme == "hub":
                yield Finding("remark", f"{key} is not in the cache of the hub; the hub will be asked for it")
            continue
        if not path.exists():
            yield Finding("error", f"{key}: {path} is not there; a relative path starts at the folder of params.yaml")
            continue
        try:
            if section == "model" and path.is_dir():
                check_folder(source, path)
            elif section == "model":
                check_access(path)
            elif scheme == "local":
                check_beginning(facts.params.text[section.removeprefix("text.")], facts.root)
        except (SourceError, FileError) as error:
            yield Finding("error", f"{key}: {str(error).removeprefix(f'{source}: ')}")


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


def rolling(facts: Facts) -> Iterator[Finding]:
    """Tasks that need a begin or end token: named in the tokenizer's files, or by default of its class."""
    tasks = [task for task in facts.params.evaluation.tasks if task.endswith("_rolling") or task == "wikitext"]
    tokenizer = facts.document("special_tokens_map.json") | facts.document("tokenizer_config.json")
    plain = tokenizer.get("tokenizer_class") in (None, "PreTrainedTokenizerFast", "TokenizersBackend")
    ends = any(tokenizer.get(key, None if plain else "default") for key in ("bos_token", "eos_token"))
    if tasks and not ends and facts.folder and (facts.folder / "tokenizer_config.json").is_file():
        yield Finding(
            "warning",
            f"evaluation.tasks: {', '.join(tasks)}: lm-eval begins a text with a begin or end token, and the "
            f"tokenizer in {facts.folder} names neither, so they will not be measured; give tokenizer_config.json one, "
            f"or take the task out",
        )


def windows(facts: Facts) -> Iterator[Finding]:
    """Windows longer than the model has positions, and windows to heal on longer than the calibration text."""
    params = facts.params
    healed = {
        f"variants.{name}.healing.window_length": variant.healing.window_length
        for name, variant in params.variants.items()
        if variant.healing
    }
    limit = next((facts.decoder[name] for name in POSITIONS if isinstance(facts.decoder.get(name), int)), None)
    turning = any(key.startswith(("rope", "rotary", "alibi")) for key in facts.decoder)
    for key, length in ({"sampling.window_length": params.sampling.window_length} | healed).items():
        if limit is not None and length > limit:
            why = "it was not trained beyond them" if turning else "it has no others"
            yield Finding(
                "warning" if turning else "error",
                f"{key} = {length}: the model has {limit} positions, and {why}; give {limit} or fewer",
            )
    file = facts.root / Path(params.text[params.sampling.calibration_text].source.removeprefix("local:")).expanduser()
    if file.suffix in (".csv", ".json", ".jsonl", ".txt") and file.is_file():
        n_bytes = file.stat().st_size  # a token has one or more
        for key, length in healed.items():
            if length > n_bytes:
                yield Finding("error", f"{key} = {length}: {file} has {n_bytes} bytes, and so fewer tokens")


def experts(facts: Facts) -> Iterator[Finding]:
    """Experts of a mixture that will stay dense, having seen fewer tokens than their matrices are wide."""
    config, on, drawn = facts.decoder, facts.params.covariance, facts.params.sampling
    keys = EXPERTS, ("num_experts_per_tok",), ("hidden_size",), ("moe_intermediate_size", "intermediate_size")
    sizes: list[Any] = [next((config[key] for key in names if config.get(key)), None) for names in keys]
    if not all(isinstance(n, int) and n > 0 for n in sizes):
        return
    n_experts, chosen, *widths = sizes
    if on.offload or on.gradient_clip:
        key = "offload" if on.offload else "gradient_clip"
        yield Finding("remark", f"covariance.{key} is set: the model's {n_experts} experts per layer stay dense")
        return
    n_windows = drawn.n_windows if on.fisher == "none" else on.fisher_windows or drawn.n_windows
    seen, needed = n_windows * drawn.window_length * chosen // n_experts, max(widths)
    if seen < needed:
        key = "sampling.n_windows" if n_windows == drawn.n_windows else "covariance.fisher_windows"
        yield Finding(
            "warning",
            f"{key} = {n_windows}: an expert of the model sees {seen} tokens on average, and one that sees fewer than "
            f"{needed}, the width of its matrices, stays dense; the average is that at "
            f"{math.ceil(needed * n_experts / chosen / drawn.window_length)} windows, and rare experts need more",
        )
