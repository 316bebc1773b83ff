"""Spectrum: weights and covariances -> data/spectrum/<key>/: summary.json, singular_values, factors, cuts."""

from pathlib import Path

from drank.model.precision import agreed_dtype, load_model
from drank.project.command import run_stage
from drank.project.files import TensorFolder, read_json, read_tensors
from drank.project.params import read_params
from drank.project.processes import Group, fill_folder
from drank.steps.spectrum import factorise


def main(key: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    asked, on = params.factors(key), params.covariance

    def work(group: Group, folder: Path) -> object:
        # Only the sensitivity runs passes; all else reads weights, which are stored in bfloat16.
        dtype = agreed_dtype(params.compute.dtype, on.device, group.gather) if asked.sensitivity_windows else "bfloat16"
        model = load_model(root / "data/raw/model", dtype, on.device)
        windows = read_tensors(root / f"data/sampling/calibration/{asked.calibration_seed}.safetensors")["windows"]
        source = root / f"data/covariance/{asked.calibration_seed}"
        covariances, described = TensorFolder(source), read_json(source / "summary.json")
        return factorise(model, asked, on, covariances, described, windows, group, TensorFolder(folder))

    fill_folder(on, "spectrum", key, root, work)


if __name__ == "__main__":
    run_stage(main)
