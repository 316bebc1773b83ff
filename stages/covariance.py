"""Covariance: the model and calibration windows -> data/covariance/<seed>/: inputs/, gradients/ and summary.json."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from drank.model.offload import load_offloaded
from drank.model.precision import agreed_dtype
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import TensorFolder, read_tensors, scratch_folder, write_json
from drank.project.params import read_params
from drank.project.processes import launch, must_launch, process_group
from drank.steps.covariance import collect


def main(seed: str, root: Path = Path()) -> None:
    params, inputs = read_params(root / "params.yaml"), Inputs(root)
    params.check_seed(seed)
    asked, destination = params.covariance, root / "data/covariance" / seed
    if must_launch(asked.processes):
        launch(asked.processes, "stages.covariance", seed, "--root", str(root))
        return
    with process_group(asked.threads, asked.device) as group, group.replacing_folder(destination) as folder:
        windows = read_tensors(inputs / f"data/sampling/calibration/{seed}.safetensors")["windows"].to(asked.device)
        base, dtype = inputs / "data/raw/model", agreed_dtype(params.compute.dtype, asked.device, group.gather)
        with scratch_folder(folder / f".offloaded-{group.rank}") as scratch:
            if asked.offload:
                model = load_offloaded(base, dtype, asked.device, asked.targets, asked.ignore, scratch / "weights")
            else:
                model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().to(asked.device)
            summary = collect(model, windows, asked, group, TensorFolder(folder), TensorFolder(scratch))
        if group.is_first:
            write_json(folder / "summary.json", summary)


if __name__ == "__main__":
    run_stage(main)
