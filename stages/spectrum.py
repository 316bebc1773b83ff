"""Spectrum: weights and covariances -> data/spectrum/<key>/: summary.json, singular_values, factors, cuts."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from drank.model.linears import find_linears
from drank.model.precision import agreed_dtype, name_of
from drank.model.vocabulary import check_windows
from drank.project.command import run_stage
from drank.project.files import TensorFolder, read_json, read_tensors, write_json
from drank.project.params import read_params
from drank.project.processes import launch, must_launch, process_group
from drank.project.progress import progress
from drank.steps.spectrum import Metrics, Writer, factorise, sensitivity


def main(key: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    on, asked, destination = params.covariance, params.factors(key), root / "data/spectrum" / key
    if must_launch(on.processes):
        launch(on.processes, "stages.spectrum", key, "--root", str(root), fills=destination)
        return
    covariances, measured = root / f"data/covariance/{asked.calibration_seed}", asked.sensitivity_windows
    described = read_json(covariances / "summary.json")
    summary = {
        "metric": asked.metric, "damping": asked.damping, "gradient_damping": asked.gradients_damped_by,
        "computed_in": {"covariance": described["dtype"]}, "left_dense": described["left_dense"],
    }  # fmt: skip
    with process_group(on.threads, on.device) as group, group.replacing_folder(destination) as folder:
        # Only the sensitivity runs passes; all else reads weights, which are stored in bfloat16.
        dtype = agreed_dtype(params.compute.dtype, on.device, group.gather) if measured else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=dtype).to(on.device)
        linears = find_linears(model, on.targets, on.ignore)
        store = TensorFolder(folder)
        writer = Writer(store)
        metrics = Metrics(asked, TensorFolder(covariances), described["owners"], on.device)
        bar = partial(progress, quiet=not group.is_first)
        summary |= factorise(model, linears, asked, metrics, group, writer, partial(bar, desc=f"spectrum {key}"))
        if measured:
            file = f"data/sampling/calibration/{asked.calibration_seed}.safetensors"
            windows = read_tensors(root / file)["windows"][:measured]
            check_windows(model, windows, file)
            found = sensitivity(
                model.eval(), linears[group.share], writer.singular_values,
                lambda name, k: store.rows(f"factors/{name}", k), windows,
                asked.sensitivity_ratios, on.batch_windows, partial(bar, desc="sensitivity", unit="matrices"),
            )  # fmt: skip
            summary["sensitivity"] = {name: scores for part in group.gather(found) for name, scores in part.items()}
            summary["computed_in"] |= {"sensitivity": name_of(dtype)}
        if group.is_first:
            store["singular_values"] = writer.singular_values
            write_json(folder / "summary.json", summary)


if __name__ == "__main__":
    run_stage(main)
