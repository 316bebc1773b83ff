"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder.

A variant that is to be healed is trained here. A killed run goes on from data/compression/.<variant>.checkpoint.
"""

from pathlib import Path

from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, copy_files, file_sha256, read_json, replacing_folder, weights_sha256
from drank.project.params import Healing, read_params


def main(variant: str, root: Path = Path()) -> None:
    params, inputs, base = read_params(root / "params.yaml"), Inputs(root), root / "data/raw/model"
    asked, source = params.variant(variant)[0], inputs / f"data/allocation/{variant}.json"
    allocation = read_json(source)
    with replacing_folder(root / "data/compression" / variant) as folder:
        if allocation["allocation"] == "dense" and not {"precision", "embedding_bits"} & allocation.keys():
            copy_files(base, folder)
        else:  # imports torch, which takes seconds
            from transformers import AutoModelForCausalLM

            from drank.steps.compression import NEAREST, compress, rounding_of

            origin = {"variant": variant, "allocation_sha256": file_sha256(source), "base_model_sha256": hashed(base)}
            spectrum = TensorFolder(root / f"data/spectrum/{asked.spectrum}")
            model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
            rounding, factors = NEAREST, params.factors(asked.spectrum)
            if "precision" in allocation:
                covariances = root / f"data/covariance/{factors.calibration_seed}"
                owners = read_json(inputs / f"data/covariance/{factors.calibration_seed}/summary.json")["owners"]
                rounding = rounding_of(allocation, factors.metric, TensorFolder(covariances), owners)
            embedding_bits = allocation.get("embedding_bits", 16)
            compress(model, allocation["units"], spectrum, origin, rounding, embedding_bits).save_pretrained(folder)
            for file in base.iterdir():  # the tokenizer's, as `raw` saved them
                if ".safetensors" not in file.name and not (folder / file.name).exists():
                    copy_files(file, folder)
        if asked.healing:
            text = inputs / "data/sampling/calibration_text.safetensors"
            checkpoint = root / f"data/compression/.{variant}.checkpoint"
            save_healed(folder, base, text, asked.healing, params.compute.dtype, checkpoint)
        copy_files(source, folder / "allocation.json")


def save_healed(folder: Path, base: Path, text: Path, asked: Healing, dtype: str, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from drank.model.lora import CURVE
    from drank.model.precision import compute_dtype, name_of
    from drank.project.checkpoint import Checkpoint
    from drank.project.files import read_tensors, write_json
    from drank.project.processes import process_group
    from drank.project.progress import progress
    from drank.steps.healing import heal

    with process_group(asked.threads, asked.device):
        torch.use_deterministic_algorithms(True)
        passes, inputs = compute_dtype(dtype, asked.device), [hashed(folder), hashed(base), file_sha256(text)]
        identity = {"inputs": inputs, "healing": asked.model_dump(mode="json"), "dtype": name_of(passes)}
        kept, sources = Checkpoint(checkpoint, identity), {"compressed": folder, "dense": base}
        stored, curve = heal(
            lambda name, dtype: AutoModelForCausalLM.from_pretrained(sources[name], dtype=dtype),
            read_tensors(text), asked, passes, inputs[0], kept, progress,
        )  # fmt: skip
    stored.save_pretrained(folder)
    write_json(folder / CURVE, curve)
    kept.remove()


def hashed(folder: Path) -> str:
    return weights_sha256({file.name: file_sha256(file) for file in folder.glob("*.safetensors")})


if __name__ == "__main__":
    run_stage(main)
