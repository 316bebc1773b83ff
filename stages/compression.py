"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drank.compression import compress
from drank.workflow.files import file_sha256, read_json, read_rows, read_tensors, replacing_folder, weights_sha256
from drank.workflow.recorded import Inputs
from drank.workflow.stage import run_stage


def main(variant: str, root: Path = Path()) -> None:
    inputs = Inputs(root)
    source = inputs / f"data/allocation/{variant}.json"
    allocation = read_json(source)
    spectrum, base = f"data/spectrum/{allocation['spectrum']}", inputs / "data/raw/model"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    provenance = {
        "variant": variant,
        "allocation_sha256": file_sha256(source),
        "base_model_sha256": weights_sha256({file.name: file_sha256(file) for file in base.glob("*.safetensors")}),
    }
    compress(
        model,
        allocation["units"],
        lambda file, rank: read_rows(
            inputs / f"{spectrum}/factors/{file}.safetensors", ("output_vectors", "input_vectors"), rank
        ),
        lambda mlp, channels: read_tensors(inputs / f"{spectrum}/cuts/{mlp}.{channels}.safetensors"),
        provenance,
    )
    with replacing_folder(root / "data/compression" / variant) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        shutil.copyfile(source, folder / "allocation.json")


if __name__ == "__main__":
    run_stage(main)
