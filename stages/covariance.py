"""Covariance: the model and calibration windows -> data/covariance/<seed>/: inputs/, gradients/ and summary.json."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from drank.covariance import NotFiniteError, SecondMoment
from drank.language_model.capture import run_backward, run_windows, watching_inputs, watching_output_gradients
from drank.language_model.linears import find_linears, shared_inputs
from drank.workflow.files import read_tensors, replacing_folder, write_json, write_tensors
from drank.workflow.params import read_params
from drank.workflow.stage import run_stage


def main(seed: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml").covariance
    torch.set_num_threads(params.threads)
    windows = read_tensors(root / f"data/sampling/calibration/{seed}.safetensors")["windows"]
    model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=torch.bfloat16).eval()
    linears = find_linears(model, params.targets, params.ignore)
    owners = shared_inputs(model, linears, windows[:1, :8])
    modules = {linear.name: linear.module for linear in linears}
    inputs = {linear.name: SecondMoment(linear.in_features) for linear in linears if owners[linear.name] == linear.name}
    gradients = {linear.name: SecondMoment(linear.out_features) for linear in linears if params.fisher != "none"}
    if gradients:
        passes = run_backward(model, windows, params.batch_windows, params.fisher, params.fisher_seed)
    else:
        passes = run_windows(model, windows, params.batch_windows)
    with (
        watching_inputs({name: modules[name] for name in inputs}, lambda name, x: inputs[name].add(x)),
        watching_output_gradients({name: modules[name] for name in gradients}, lambda name, g: gradients[name].add(g)),
        tqdm(total=len(windows), desc=f"covariance {seed}", unit="window") as bar,
    ):
        for n in passes:
            bar.update(n)
    with replacing_folder(root / "data/covariance" / seed) as folder:
        for name, moment in inputs.items():
            tensors = {
                "covariance": _mean(f"activations entering {name}", moment),
                "magnitude": moment.mean_magnitude(),
            }
            write_tensors(folder / f"inputs/{name}.safetensors", {key: t.float() for key, t in tensors.items()})
        for name, moment in gradients.items():
            covariance = _mean(f"gradients leaving {name}", moment).float()
            write_tensors(folder / f"gradients/{name}.safetensors", {"covariance": covariance})
        summary = {"fisher": params.fisher, "owners": owners, "n_tokens": windows.numel(), "n_windows": len(windows)}
        write_json(folder / "summary.json", summary)


def _mean(what: str, moment: SecondMoment) -> torch.Tensor:
    try:
        return moment.mean()
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error}") from None


if __name__ == "__main__":
    run_stage(main)
