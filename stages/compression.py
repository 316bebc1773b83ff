"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder."""

from pathlib import Path
from typing import Any

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import (
    copy_files,
    file_sha256,
    read_json,
    read_rows,
    read_tensors,
    replacing_folder,
    weights_sha256,
)


def main(variant: str, root: Path = Path()) -> None:
    source, base = Inputs(root) / f"data/allocation/{variant}.json", root / "data/raw/model"
    allocation = read_json(source)
    with replacing_folder(root / "data/compression" / variant) as folder:
        if allocation["allocation"] == "dense":
            copy_files(base, folder)
        else:
            save_compressed(root / f"data/spectrum/{allocation['spectrum']}", source, allocation, base, folder)
        copy_files(source, folder / "allocation.json")


def save_compressed(spectrum: Path, source: Path, allocation: dict[str, Any], base: Path, folder: Path) -> None:
    import torch  # what the dense variant can do without takes seconds to import
    from transformers import AutoModelForCausalLM

    from drank.steps.compression import compress

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    provenance = {
        "variant": allocation["variant"],
        "allocation_sha256": file_sha256(source),
        "base_model_sha256": weights_sha256({file.name: file_sha256(file) for file in base.glob("*.safetensors")}),
    }
    compress(
        model,
        allocation["units"],
        lambda file, rank: read_rows(spectrum / f"factors/{file}.safetensors", rank),
        lambda mlp, channels: read_tensors(spectrum / f"cuts/{mlp}.{channels}.safetensors"),
        provenance,
    )
    model.save_pretrained(folder)
    for file in base.iterdir():  # the tokenizer's, as `raw` saved them
        if ".safetensors" not in file.name and not (folder / file.name).exists():
            copy_files(file, folder)


if __name__ == "__main__":
    run_stage(main)
