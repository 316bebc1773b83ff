"""``drank export``: a compressed model as a plain one, for tools that know no factors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drank.cli.options import weights_bytes

if TYPE_CHECKING:
    from drank.project.documents import Provenance


class ExportError(ValueError):
    """A folder that cannot be exported, or a place where it cannot be written; the message says why and what to do."""


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The folder of a compressed model.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; there must be nothing yet.")],
    dense: Annotated[bool, typer.Option("--dense", help="Multiply the factors out.")] = False,
) -> None:
    """Write a compressed model as a plain Hugging Face folder, as large as its base model.

    For programs that cannot `import drank`; others take MODEL_DIR as it is.
    """
    provenance = check(model, destination, dense)
    from drank import __version__
    from drank.project.files import file_sha256, replacing_folder, write_text
    from drank.steps.release import CHECKSUMS

    with replacing_folder(destination) as folder:
        save_dense(model, folder)
        before, after = weights_bytes(model) / 1e6, weights_bytes(folder) / 1e6
        sums = model / CHECKSUMS
        card = CARD.format(
            provenance=provenance,
            before=before,
            after=after,
            sums=f"`{file_sha256(sums)}`" if sums.is_file() else "none: not a released folder",
            version=__version__,
        )
        write_text(folder / "README.md", card)
    typer.echo(f"{model}: {before:.1f} MB, compressed")
    typer.echo(f"{destination}: {after:.1f} MB, plain; nothing is saved in size")


def check(model: Path, destination: Path, dense: bool) -> "Provenance":
    """Refuse what cannot be exported before anything is loaded, and say what the folder was made of.

    Raises:
        ExportError: the folder is no model's, or plain, or the destination is taken or inside it, or `dense` is
            not asked.
        FileError: a file of the folder is damaged, or another program's.
    """
    from drank.audit.folder import Folder

    folder = Folder(model)
    if not (model / "config.json").is_file():
        raise ExportError(f"{model}: no config.json, so not the folder of a model")
    if folder.quantization is None:
        raise ExportError(f"{model}: not compressed, so plain already: copy it as it is")
    if not folder.stored:
        raise ExportError(f"{model}: no weights (*.safetensors); copy it again")
    if not dense:
        raise ExportError(
            f"{model}: loads with plain from_pretrained after `import drank`, so copy it as it is (docs/loading.md); "
            f"for tools that know no factors --dense writes a plain model, as large as the base model"
        )
    if destination.exists() or destination.resolve().is_relative_to(model.resolve()):
        raise ExportError(f"{destination}: exists already, or is inside the folder that is exported; name another")
    return folder.quantization.provenance


def save_dense(model: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config; equal folders give equal bytes.

    A weight is the product of its factors, formed in float32 and rounded once to the dtype of the factors. Channels
    that an MLP lost come back as zeros. Weights in shards give shards, none larger than the largest of them.

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
    loaded.dequantize()
    loaded.save_pretrained(folder, **({"max_shard_size": max(shards)} if len(shards) > 1 else {}))
    tokenizer.save_pretrained(folder)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- drank
- low-rank
- svd
---
# {provenance.variant}, multiplied out

The plain form of a model that was compressed by truncated SVD with drank, for tools that know no factors. It predicts
what the compressed one predicts, but for the rounding of weights to bfloat16. It **saves nothing**: {after:.1f} MB of
weights where the compressed folder has {before:.1f} MB, and as much arithmetic as the base model. Channels that were
removed from MLPs are zeros here.

| made of | sha256 |
|---|---|
| the released folder, by its `SHA256SUMS` | {sums} |
| `allocation.json`, the rank of every matrix | `{provenance.allocation_sha256}` |
| weights of the base model | `{provenance.base_model_sha256}` |

Written by `drank export --dense` (drank {version}). Results, limits, licence and `drank audit` belong to the compressed
folder: ask for it by the hashes above.
"""
