"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder."""

from pathlib import Path
from typing import Any

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, copy_files, file_sha256, read_json, replacing_folder, weights_sha256


def main(variant: str, root: Path = Path()) -> None:
    source, base = Inputs(root) / f"data/allocation/{variant}.json", root / "data/raw/model"
    allocation = read_json(source)
    with replacing_folder(root / "data/compression" / variant) as folder:
        if allocation["allocation"] == "dense":
            copy_files(base, folder)
        else:
            spectrum = TensorFolder(root / f"data/spectrum/{allocation['spectrum']}")
            save_compressed(base, spectrum, allocation, file_sha256(source), folder)
        copy_files(source, folder / "allocation.json")


def save_compressed(base: Path, spectrum: TensorFolder, allocation: dict[str, Any], sha256: str, folder: Path) -> None:
    import torch  # the dense variant does without, which saves seconds
    from transformers import AutoModelForCausalLM

    from drank.steps.compression import compress

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    weights = {file.name: file_sha256(file) for file in base.glob("*.safetensors")}
    provenance = {
        "variant": allocation["variant"],
        "allocation_sha256": sha256,
        "base_model_sha256": weights_sha256(weights),
    }
    compress(
        model,
        allocation["units"],
        lambda file, rank: spectrum.rows(f"factors/{file}", rank),
        lambda mlp, channels: spectrum[f"cuts/{mlp}.{channels}"],
        provenance,
    )
    model.save_pretrained(folder)
    for file in base.iterdir():  # the tokenizer's, as `raw` saved them
        if ".safetensors" not in file.name and not (folder / file.name).exists():
            copy_files(file, folder)


if __name__ == "__main__":
    run_stage(main)
