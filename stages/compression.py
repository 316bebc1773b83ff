"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder.

A variant that is to be healed is trained here. A killed run goes on from data/compression/.<variant>.checkpoint.
"""

from pathlib import Path
from typing import Any

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, copy_files, file_sha256, read_json, replacing_folder, weights_sha256
from drank.project.params import Healing, read_params


def main(variant: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    (asked, _), inputs = params.variant(variant), Inputs(root)
    source, base = inputs / f"data/allocation/{variant}.json", root / "data/raw/model"
    allocation = read_json(source)
    with replacing_folder(root / "data/compression" / variant) as folder:
        if allocation["allocation"] == "dense":
            copy_files(base, folder)
        else:
            spectrum = TensorFolder(root / f"data/spectrum/{allocation['spectrum']}")
            save_compressed(base, spectrum, allocation, file_sha256(source), folder)
        if asked.healing:
            text = inputs / "data/sampling/calibration_text.safetensors"
            checkpoint = root / f"data/compression/.{variant}.checkpoint"
            save_healed(folder, base, text, asked.healing, params.compute.dtype, checkpoint)
        copy_files(source, folder / "allocation.json")


def save_compressed(base: Path, spectrum: TensorFolder, allocation: dict[str, Any], sha256: str, folder: Path) -> None:
    import torch  # the dense variant does without, which saves seconds
    from transformers import AutoModelForCausalLM

    from drank.steps.compression import compress

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    provenance = {
        "variant": allocation["variant"],
        "allocation_sha256": sha256,
        "base_model_sha256": hashed(base),
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


def save_healed(folder: Path, base: Path, text: Path, asked: Healing, dtype: str, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from drank.model.lora import CURVE
    from drank.model.precision import compute_dtype, name_of
    from drank.project.checkpoint import Checkpoint
    from drank.project.files import read_tensors, write_json
    from drank.project.processes import check_device
    from drank.project.progress import progress
    from drank.steps.healing import heal

    check_device(asked.device)
    torch.set_num_threads(asked.threads)
    torch.use_deterministic_algorithms(True)
    passes, before = compute_dtype(dtype, asked.device), hashed(folder)
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(source, dtype=passes).eval().to(asked.device) if source else None
        for source in (folder, base if asked.objective == "distillation" else None)
    )
    read = [before, hashed(base), file_sha256(text)]
    kept = Checkpoint(checkpoint, {"inputs": read, "healing": asked.model_dump(mode="json"), "dtype": name_of(passes)})
    trained, curve = heal(model, teacher, read_tensors(text), asked, kept, progress)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    stored.load_state_dict(trained.state_dict())  # rounds every tensor to its stored type
    section = stored.config.quantization_config
    section.provenance = section.provenance | {"healed_from_sha256": before, "healed_in": name_of(passes)}
    stored.save_pretrained(folder)
    write_json(folder / CURVE, curve)
    kept.remove()


def hashed(folder: Path) -> str:
    return weights_sha256({file.name: file_sha256(file) for file in folder.glob("*.safetensors")})


if __name__ == "__main__":
    run_stage(main)
