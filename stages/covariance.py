"""Covariance: the model and the calibration windows -> data/covariance/<input>.safetensors and summary.json."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from drank.covariance import NotFiniteError, SecondMoment
from drank.language_model.capture import run_windows, watching_inputs
from drank.language_model.linears import find_linears, shared_inputs
from drank.workflow.files import read_tensors, replacing_folder, write_json, write_tensors
from drank.workflow.params import read_params
from drank.workflow.stage import run_stage


def main(root: Path = Path()) -> None:
    params = read_params(root / "params.yaml").covariance
    torch.set_num_threads(params.threads)
    windows = read_tensors(root / "data/sampling/calibration.safetensors")["windows"]
    model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=torch.bfloat16).eval()
    linears = find_linears(model, params.targets, params.ignore)
    owners = shared_inputs(model, linears, windows[:1, :8])
    watched = {linear.name: linear for linear in linears if owners[linear.name] == linear.name}
    moments = {name: SecondMoment(linear.in_features) for name, linear in watched.items()}
    modules = {name: linear.module for name, linear in watched.items()}
    with watching_inputs(modules, lambda name, x: moments[name].add(x)), _bar(len(windows)) as bar:
        for n in run_windows(model, windows, params.batch_windows):
            bar.update(n)
    with replacing_folder(root / "data/covariance") as folder:
        for name, moment in moments.items():
            write_tensors(folder / f"{name}.safetensors", {"input_covariance": _mean(name, moment).float()})
        summary = {"owners": owners, "n_tokens": windows.numel(), "n_windows": len(windows)}
        write_json(folder / "summary.json", summary)


def _bar(n_windows: int) -> tqdm:
    return tqdm(total=n_windows, desc="covariance", unit="window")


def _mean(name: str, moment: SecondMoment) -> torch.Tensor:
    try:
        return moment.mean()
    except NotFiniteError as error:
        raise NotFiniteError(f"activations entering {name}: {error}") from None


if __name__ == "__main__":
    run_stage(main)
