"""The plain form: factors multiplied out, for tools that know none."""

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drank.project.files import write_text

if TYPE_CHECKING:
    from torch import Tensor, dtype


def write(model: Path, folder: Path, *, provenance: Mapping[str, str]) -> None:
    """Write a plain Hugging Face folder with a card that has the hashes of its sources."""
    save_dense(model, folder)
    before, after = (sum(file.stat().st_size for file in f.glob("*.safetensors")) / 1e6 for f in (model, folder))
    sums = provenance.get("drank.sha256sums")
    card = CARD.format(
        **{key.removeprefix("drank."): value for key, value in provenance.items()},
        before=before,
        after=after,
        sums=f"`{sums}`" if sums else "none: not a released folder",
        drank=json.loads(provenance["drank.versions"])["drank"],
    )
    write_text(folder / "README.md", card)


def save_dense(model: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config; equal folders give equal bytes.

    A weight is the product of its factors, formed in float64 and rounded once to the dtype of the factors: products of
    bfloat16 numbers sum without an error there, but for numbers 2^20 apart, so that other processors, which sum in
    another order, write the same bytes. Channels that an MLP lost come back as zeros. Weights in shards give shards,
    none larger than the largest of them.

    Raises:
        FormatError: config.json is that of a newer drank, or does not fit the weights.
        SourceError: there is no tokenizer that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drank.project.sources import told

    shards = [file.stat().st_size for file in model.glob("*.safetensors")]
    plain = {"local_files_only": True, "trust_remote_code": False}  # False does not ask, and runs nothing of the folder
    with told(f"{model}: its tokenizer cannot be loaded; copy that of the base model into it"):
        tokenizer = AutoTokenizer.from_pretrained(model, **plain)
    loaded = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, **plain)
    for module in loaded.modules():
        if hasattr(module, "dense_weight"):
            module.dense_weight = partial(_exactly, module, loaded.dtype)
    loaded.dequantize()
    loaded.save_pretrained(folder, **({"max_shard_size": max(shards)} if len(shards) > 1 else {}))
    tokenizer.save_pretrained(folder)


def _exactly(module: Any, dtype: "dtype") -> "Tensor":
    """W in this dtype, its sums in float64."""
    product: Tensor = type(module).dense_weight(deepcopy(module).double())
    return product.to(dtype)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- drank
- low-rank
- svd
---
# {variant}, multiplied out

The plain form of a model that was compressed by truncated SVD with drank, for tools that know no factors. It predicts
what the compressed one predicts, but for the rounding of weights to bfloat16. It **saves nothing**: {after:.1f} MB of
weights where the compressed folder has {before:.1f} MB, and as much arithmetic as the base model. Channels that were
removed from MLPs are zeros here.

| made of | sha256 |
|---|---|
| the released folder, by its `SHA256SUMS` | {sums} |
| `allocation.json`, the rank of every matrix | `{allocation_sha256}` |
| weights of the base model | `{base_model_sha256}` |

Written by `drank export --dense` (drank {drank}). Results, limits and licence belong to the compressed folder: ask for
it by the hashes above. `drank audit` of this folder leads back to it.
"""
