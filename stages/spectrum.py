"""Spectrum: weights and covariances -> data/spectrum/<key>/: summary.json, singular_values, factors, cuts."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from drank.model.precision import agreed_dtype
from drank.project.command import run_stage
from drank.project.files import TensorFolder, read_json, read_tensors, write_json
from drank.project.params import read_params
from drank.project.processes import launch, must_launch, process_group
from drank.project.progress import progress
from drank.steps.spectrum import add_sensitivity, factorise


def main(key: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    on, asked, destination = params.covariance, params.factors(key), root / "data/spectrum" / key
    if must_launch(on.processes):
        launch(on.processes, "stages.spectrum", key, "--root", str(root))
        return
    seed, measured = asked.calibration_seed, asked.sensitivity_windows
    covariances = root / f"data/covariance/{seed}"
    with process_group(on.threads, on.device) as group, group.replacing_folder(destination) as folder:
        # Only the sensitivity runs passes; all else reads weights, which are stored in bfloat16.
        dtype = agreed_dtype(params.compute.dtype, on.device, group.gather) if measured else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=dtype).eval().to(on.device)
        store, bar = TensorFolder(folder), partial(progress, quiet=not group.is_first, desc=f"spectrum {key}")
        described = read_json(covariances / "summary.json")
        summary = factorise(model, asked, on, TensorFolder(covariances), described, group, store, bar)
        if measured:
            windows = read_tensors(root / f"data/sampling/calibration/{seed}.safetensors")["windows"][:measured]
            add_sensitivity(summary, model, asked, on, store.rows, windows, group, partial(bar, desc="sensitivity"))
        if group.is_first:
            write_json(folder / "summary.json", summary)


if __name__ == "__main__":
    run_stage(main)
