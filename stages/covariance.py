"""Covariance: the model and calibration windows -> data/covariance/<seed>/: inputs/, gradients/ and summary.json."""

from pathlib import Path

from drank.model.offload import load_for_sweeps
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, read_tensors, scratch_folder
from drank.project.params import read_params
from drank.project.processes import Group, fill_folder
from drank.steps.covariance import collect


def main(seed: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    params.check_seed(seed)
    on, dtype = params.covariance, params.compute.dtype

    def work(group: Group, folder: Path) -> object:
        windows = read_tensors(inputs / f"data/sampling/calibration/{seed}.safetensors")["windows"].to(on.device)
        with scratch_folder(folder / f".offloaded-{group.rank}") as scratch:
            base, weights = inputs / "data/raw/model", scratch if on.offload else None
            model = load_for_sweeps(base, dtype, on.device, group.gather, on.targets, on.ignore, weights)
            return collect(model, windows, on, group, TensorFolder(folder), TensorFolder(scratch))

    fill_folder(on, "covariance", seed, root, work)


if __name__ == "__main__":
    run_stage(main)
