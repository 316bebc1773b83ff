"""Covariance: the model and calibration windows -> data/covariance/<seed>/: inputs/, gradients/ and summary.json."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from drank.method.covariance import NotFiniteError, SecondMoment
from drank.model.capture import (
    Callback,
    run_backward,
    run_windows,
    split_windows,
    watching_inputs,
    watching_output_gradients,
)
from drank.model.linears import LeftDense, Linear, find_linears, shared_inputs, survey, unreached
from drank.model.offload import Sweep, disk_map, find_blocks, offloaded_sweeps
from drank.model.precision import agreed_dtype, has_units, name_of
from drank.model.vocabulary import check_ids
from drank.project.command import run_stage
from drank.project.dvc import Inputs
from drank.project.files import read_tensors, scratch_folder, write_json, write_tensors
from drank.project.params import Covariance, read_params
from drank.project.processes import Group, launch, must_launch, process_group
from drank.project.progress import progress

log = logging.getLogger("drank.method.covariance")


def main(seed: str, root: Path = Path()) -> None:
    asked = read_params(root / "params.yaml")
    asked.check_seed(seed)
    params, destination = asked.covariance, root / "data/covariance" / seed
    if must_launch(params.processes):
        launch(params.processes, "stages.covariance", seed, "--root", str(root), fills=destination)
        return
    with process_group(params.threads, params.device) as group, group.replacing_folder(destination) as folder:
        inputs = Inputs(root)
        windows = read_tensors(inputs / f"data/sampling/calibration/{seed}.safetensors")["windows"].to(params.device)
        with scratch_folder(folder / f".offloaded-{group.rank}") as scratch:
            dtype = agreed_dtype(asked.compute.dtype, params.device, group.gather)
            collect(inputs / "data/raw/model", windows, params, dtype, group, folder, scratch)


def collect(
    model_folder: Path,
    windows: Tensor,
    params: Covariance,
    dtype: torch.dtype,
    group: Group,
    folder: Path,
    scratch: Path,
) -> None:
    model = load(model_folder, params, dtype, scratch)
    moment = partial(SecondMoment, device=params.device, bfloat16_units=has_units(torch.bfloat16, params.device))
    check_ids(model, windows, "data/sampling/calibration")
    linears, left = survey(model, params.targets, params.ignore)
    if group.rank == 0:
        log.info(told(linears, left))
    owners = shared_inputs(model, linears, windows[:1, :8])
    mine = n_passes(model, linears, params, len(windows)) // group.size  # about: batches are dealt out, not windows
    bar = progress(desc="covariance", unit="windows", total=mine, quiet=group.rank > 0)
    for sweep in sweeps(model, linears, windows, params, group, scratch):
        within = {linear.name: linear for linear in linears if linear.name.startswith(sweep.prefix)}
        owning = {name: linear for name, linear in within.items() if owners[name] == name}
        inputs = {n: moment(a.in_features) for n, a in owning.items() if sweep.inputs}
        gradients = {n: moment(a.out_features, magnitudes=False) for n, a in within.items() if sweep.gradients}
        with (
            watching_inputs({name: within[name].module for name in inputs}, adding_to(inputs)),
            watching_output_gradients({name: within[name].module for name in gradients}, adding_to(gradients)),
        ):
            for n_windows in sweep.passes:
                bar.update(n_windows)
        write("inputs", "activations entering", inputs, group, folder)
        write("gradients", "gradients leaving", gradients, group, folder)
    bar.close()
    if group.rank == 0:
        summary = {"fisher": params.fisher, "owners": owners, "n_tokens": windows.numel(), "n_windows": len(windows)}
        if params.fisher != "none":
            summary["fisher_windows"] = params.fisher_windows or len(windows)
        told_in = {"dtype": name_of(dtype), "left_dense": [asdict(row) for row in left]}
        write_json(folder / "summary.json", summary | told_in)


def told(linears: Sequence[Linear], left: Sequence[LeftDense]) -> str:
    """What is compressed, and what is not, for the log."""
    rows = [f"  {row.parameters:>14,}  {row.name}: {row.reason}" for row in left]
    parameters = sum(linear.weight.numel() for linear in linears)
    return "\n".join([f"{len(linears)} linears with {parameters:,} parameters to compress; left as it is:", *rows])


def adding_to(moments: dict[str, SecondMoment]) -> Callback:
    return lambda name, rows: moments[name].add(rows)


def load(model_folder: Path, params: Covariance, dtype: torch.dtype, scratch: Path) -> Any:
    if not params.offload:
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval().to(params.device)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    blocks = find_blocks(skeleton, find_linears(skeleton, params.targets, params.ignore))
    places = disk_map(skeleton, blocks, params.device)
    return AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, device_map=places, offload_folder=scratch / "weights"
    ).eval()


def sweeps(
    model: Any, linears: list[Linear], windows: Tensor, params: Covariance, group: Group, scratch: Path
) -> Iterator[Sweep]:
    """All passes at once, or block after block."""
    if params.offload:
        batches = split_windows(windows, params.batch_windows, group.share, params.fisher_windows)
        blocks = find_blocks(model, linears)
        yield from offloaded_sweeps(model, blocks, batches, params.fisher, params.fisher_seed, Files(scratch))
    elif params.fisher == "none":
        yield Sweep("", True, False, run_windows(model, windows, params.batch_windows, group.share))
    else:
        passes = run_backward(
            model, windows, params.batch_windows, params.fisher, params.fisher_seed, group.share, params.fisher_windows
        )
        yield Sweep("", True, True, passes)


def n_passes(model: Any, linears: list[Linear], params: Covariance, n_windows: int) -> int:
    """Passes of all windows together: each once, or block after block and, with gradients, back from the head."""
    if not params.offload:
        return n_windows
    n_blocks = len(list(model.get_submodule(find_blocks(model, linears)).children()))
    back = 0 if params.fisher == "none" else params.fisher_windows or n_windows
    return n_blocks * n_windows + (n_blocks + 1) * back


class Files:
    """Tensors by name, each a file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        write_tensors(self.folder / f"{name}.safetensors", {name: tensor})

    def __getitem__(self, name: str) -> Tensor:
        return read_tensors(self.folder / f"{name}.safetensors")[name]

    def __delitem__(self, name: str) -> None:
        (self.folder / f"{name}.safetensors").unlink()


def write(kind: str, what: str, moments: dict[str, SecondMoment], group: Group, folder: Path) -> None:
    """Means over the tokens of all processes; inputs have their magnitudes beside them."""
    missed = []
    for name, moment in moments.items():
        n_tokens = torch.tensor(moment.n_tokens)
        group.sum(moment.total, n_tokens, *([] if moment.magnitude is None else [moment.magnitude]))
        moment.n_tokens = int(n_tokens)
        if group.rank:
            continue
        if (
            not moment.total.diagonal().any()
        ):  # no token, or only zeros: a metric in which every matrix is as good as none
            missed.append(name)
            continue
        try:
            tensors = {"covariance": moment.mean()}
        except NotFiniteError as error:
            raise NotFiniteError(f"{what} {name}: {error}") from None
        if moment.magnitude is not None:
            tensors["magnitude"] = moment.mean_magnitude()
        write_tensors(folder / f"{kind}/{name}.safetensors", {key: t.float().cpu() for key, t in tensors.items()})
    if missed:
        raise unreached("nothing entered" if kind == "inputs" else "no gradient came back to", missed)


if __name__ == "__main__":
    run_stage(main)
