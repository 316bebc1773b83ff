"""Spectrum: weights and covariances -> data/spectrum/<key>/: summary.json, singular_values and factors a unit."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from drank.language_model.linears import find_linears
from drank.spectrum import damped, effective_rank, whitened_spectrum
from drank.workflow.files import read_json, read_tensors, replacing_folder, write_json, write_tensors
from drank.workflow.params import Spectrum, read_params
from drank.workflow.stage import run_stage


def main(key: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    torch.set_num_threads(params.covariance.threads)
    covariances = root / "data/covariance"
    owners = read_json(covariances / "summary.json")["owners"]
    model = AutoModelForCausalLM.from_pretrained(root / "data/raw/model", dtype=torch.bfloat16)
    linears = find_linears(model, params.covariance.targets, params.covariance.ignore)
    with replacing_folder(root / "data/spectrum" / key) as folder:
        units, singular_values = [], {}
        for linear in tqdm(linears, desc=f"spectrum {key}", unit="matrix"):
            H, G = metrics(params.spectrum[key], covariances, owners[linear.name], linear.name)
            spectrum = whitened_spectrum(linear.weight.detach().float(), H, G)
            factors = {"output_vectors": spectrum.output_vectors, "input_vectors": spectrum.input_vectors}
            write_tensors(folder / "factors" / f"{linear.name}.safetensors", factors)
            singular_values[linear.name] = spectrum.singular_values
            units.append({
                "name": linear.name, "kind": linear.kind, "role": linear.role, "layer": linear.layer,
                "out_features": linear.out_features, "in_features": linear.in_features,
                "effective_rank": effective_rank(spectrum.singular_values), "n_discarded": spectrum.n_discarded,
            })  # fmt: skip
        write_tensors(folder / "singular_values.safetensors", singular_values)
        write_json(folder / "summary.json", {"metric": params.spectrum[key].metric, "units": units})


def metrics(
    choice: Spectrum, covariances: Path, owner: str, name: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Input and output metric of a linear; None is the identity."""
    if choice.metric == "none":
        return None, None
    inputs = read_tensors(covariances / f"inputs/{owner}.safetensors")
    if choice.metric == "diagonal":
        return torch.diag(inputs["magnitude"] ** (2 * (choice.alpha or 0))), None
    if choice.metric == "input":
        return damped(inputs["covariance"], choice.damping), None
    gradients = read_tensors(covariances / f"gradients/{name}.safetensors")
    return damped(inputs["covariance"], choice.damping), damped(gradients["covariance"], choice.damping)


if __name__ == "__main__":
    run_stage(main)
