"""Compression: base model, allocation and cached factors -> data/compression/<variant>/, a Hugging Face folder.

A variant that is to be healed is trained here. A killed run goes on from data/compression/.<variant>.checkpoint.
"""

from functools import partial
from pathlib import Path

from drank.project import files
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, file_sha256, folder_sha256, read_json
from drank.project.params import read_params
from drank.project.progress import progress


def main(variant: str, root: Path = Path()) -> None:
    params, inputs, base = read_params(root / "params.yaml"), Inputs(root), root / "data/raw/model"
    asked, source = params.variant(variant)[0], inputs / f"data/allocation/{variant}.json"
    allocation, factors = read_json(source), params.factors(asked.spectrum)
    with files.replacing_folder(root / "data/compression" / variant) as folder:
        if allocation["allocation"] == "dense" and not {"precision", "embedding_bits"} & allocation.keys():
            files.copy_files(base, folder)
        else:  # imports torch, which takes seconds
            from drank.model.precision import load_model
            from drank.steps.compression import compressed

            origin = {"variant": variant, "allocation_sha256": file_sha256(source)}
            origin["base_model_sha256"] = folder_sha256(base)
            described = inputs / f"data/covariance/{factors.calibration_seed}/summary.json"
            compressed(
                load_model(base, "bfloat16", "cpu"), allocation, factors.metric, origin,
                TensorFolder(root / f"data/spectrum/{asked.spectrum}"),
                TensorFolder(described.parent), partial(read_json, described),
            ).save_pretrained(folder)  # fmt: skip
            for file in base.iterdir():  # the tokenizer's, as `raw` saved them
                if ".safetensors" not in file.name and not (folder / file.name).exists():
                    files.copy_files(file, folder)
        if asked.healing:
            from drank.model.precision import load_model
            from drank.model.saved import CURVE
            from drank.project.checkpoint import Checkpoint
            from drank.steps.healing import heal

            text, models = inputs / "data/sampling/calibration_text.safetensors", {"compressed": folder, "dense": base}
            sha256 = {name: folder_sha256(model) for name, model in models.items()} | {"text": file_sha256(text)}
            kept = root / f"data/compression/.{variant}.checkpoint"
            healed, curve = heal(
                lambda name, dtype: load_model(models[name], dtype, "cpu"), files.read_tensors(text), asked.healing,
                params.compute.dtype, sha256, partial(Checkpoint, kept), progress,
            )  # fmt: skip
            healed.save_pretrained(folder)
            files.write_json(folder / CURVE, curve)
            Checkpoint(kept, {}).remove()
        files.copy_files(source, folder / "allocation.json")


if __name__ == "__main__":
    run_stage(main)
