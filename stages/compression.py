"""Compression: base model, allocation and cached factors -> data/models/<variant>/, a Hugging Face folder."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drank.compression import compress, module_specs
from drank.workflow.files import file_sha256, read_json, read_rows, replacing_folder
from drank.workflow.stage import run_stage


def main(variant: str, root: Path = Path()) -> None:
    source = root / "data/allocation" / f"{variant}.json"
    allocation = read_json(source)
    factors = root / "data/spectrum" / allocation["spectrum"] / "factors"
    model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=torch.bfloat16)
    provenance = {
        "variant": variant,
        "allocation_sha256": file_sha256(source),
        "base_model_sha256": file_sha256(root / "data/raw/model/model.safetensors"),
    }
    compress(
        model,
        module_specs(allocation["units"]),
        lambda name, rank: read_rows(factors / f"{name}.safetensors", ("output_vectors", "input_vectors"), rank),
        provenance,
    )
    with replacing_folder(root / "data/models" / variant) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(root / "data/raw/model").save_pretrained(folder)
        shutil.copyfile(source, folder / "allocation.json")


if __name__ == "__main__":
    run_stage(main)
