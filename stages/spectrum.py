"""Spectrum: weights and covariances -> data/spectrum/<key>/: summary.json, singular_values, factors a unit, cuts."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from drank.method.channels import remove_channels, row_grams
from drank.method.covariance import NotFiniteError
from drank.method.spectrum import Metric, damped, effective_rank, gram_spectrum, whitened_spectrum
from drank.method.spectrum import Spectrum as Factored
from drank.model.groups import Mlp, find_groups, find_mlps
from drank.model.linears import Linear, find_linears
from drank.model.precision import agreed_dtype, name_of
from drank.model.substitution import measure_sensitivity
from drank.model.vocabulary import check_ids
from drank.project.command import run_stage
from drank.project.files import read_json, read_rows, read_tensors, write_json, write_tensors
from drank.project.params import Params, Spectrum, read_params
from drank.project.processes import Group, launch, must_launch, process_group
from drank.project.progress import progress


def main(key: str, root: Path = Path()) -> None:
    params = read_params(root / "params.yaml")
    params.factors(key)
    on, destination = params.covariance, root / "data/spectrum" / key
    if must_launch(on.processes):
        launch(on.processes, "stages.spectrum", key, "--root", str(root), fills=destination)
        return
    with process_group(on.threads, on.device) as group, group.replacing_folder(destination) as folder:
        collect(key, root, params, group, folder)


def collect(key: str, root: Path, params: Params, group: Group, folder: Path) -> None:
    asked, data = params.factors(key), root / "data"
    # Passes are those of the sensitivity alone; all else reads weights, which are stored in bfloat16.
    passes = (
        agreed_dtype(params.compute.dtype, params.covariance.device, group.gather)
        if asked.sensitivity_windows
        else None
    )
    model = AutoModelForCausalLM.from_pretrained(data / "raw/model", dtype=passes or torch.bfloat16)
    model = model.to(params.covariance.device)
    linears = find_linears(model, params.covariance.targets, params.covariance.ignore)
    mlps = find_mlps(model, linears) if asked.units == "block" else []
    in_mlps = {linear.name for mlp in mlps for linear in (*mlp.before, mlp.down)}
    single = [linear for linear in linears if linear.name not in in_mlps]
    groups = find_groups(single, asked.layers, asked.even_with_grouped_heads)
    metrics = Metrics(asked, data / f"covariance/{asked.calibration_seed}", params.covariance.device)
    writer = Writer(folder)
    bar = partial(progress, desc=f"spectrum {key}", quiet=group.rank > 0)
    units = {i: unit(groups[i], metrics, writer) for i in bar(shared_out(groups, group), unit="units")}
    members = [(*mlp.before, mlp.down) for mlp in mlps]
    blocks = {i: block(mlps[i], asked.cuts, metrics, writer) for i in bar(shared_out(members, group), unit="MLPs")}
    measured = read_json(metrics.covariances / "summary.json")
    summary: dict[str, Any] = {
        "metric": asked.metric,
        "damping": asked.damping,
        "gradient_damping": metrics.gradient_damping,
        "computed_in": {"covariance": measured["dtype"]} | ({"sensitivity": name_of(passes)} if passes else {}),
        "left_dense": measured["left_dense"],
        "units": in_order(group.gather(list(units.items()))),
        "blocks": in_order(group.gather(list(blocks.items()))),
    }
    # After the gathering: the factors of all processes are there.
    values = {name: values.tolist() for name, values in writer.singular_values.items()}
    for others in group.gather(values):
        writer.singular_values |= {name: torch.tensor(v, dtype=torch.float64) for name, v in others.items()}
    if asked.sensitivity_windows:
        windows = read_tensors(data / f"sampling/calibration/{asked.calibration_seed}.safetensors")["windows"]
        windows, batch = windows[: asked.sensitivity_windows], params.covariance.batch_windows
        check_ids(model, windows, f"data/sampling/calibration/{asked.calibration_seed}.safetensors")
        mine = linears[group.share]
        bar = partial(progress, desc="sensitivity", unit="matrices", quiet=group.rank > 0)
        parts = group.gather(sensitivity(model.eval(), mine, writer, windows, asked.sensitivity_ratios, batch, bar))
        summary["sensitivity"] = {name: scores for part in parts for name, scores in part.items()}
    if group.rank == 0:
        write_tensors(folder / "singular_values.safetensors", writer.singular_values)
        write_json(folder / "summary.json", summary)


def shared_out(units: Sequence[tuple[Linear, ...]], group: Group) -> list[int]:
    """Indices of the units that this process takes: in turn by size, so that all have as much to do."""

    def flops(i: int) -> int:
        return sum(a.out_features * a.in_features * min(a.out_features, a.in_features) for a in units[i])

    return sorted(sorted(range(len(units)), key=flops, reverse=True)[group.share])


def in_order(parts: list[list[tuple[int, Any]]]) -> list[Any]:
    """What the processes found by index, as one list."""
    return [found for _, found in sorted((i, found) for part in parts for i, found in part)]


class Metrics:
    """Input and output metric of a linear; None is the identity. Linears that share their input share its metric."""

    def __init__(self, asked: Spectrum, covariances: Path, device: str = "cpu") -> None:
        self.asked, self.covariances, self.device = asked, covariances, device
        self.owners = read_json(covariances / "summary.json")["owners"]
        self.gradient_damping = asked.damping if asked.gradient_damping is None else asked.gradient_damping
        self._latest: tuple[str, Metric] | None = None

    def of(self, linear: Linear) -> tuple[Metric | None, Metric | None]:
        if self.asked.metric == "none":
            return None, None
        gradients = self.asked.metric == "kfac"
        return self._of_inputs(self.owners[linear.name]), self._of_gradients(linear.name) if gradients else None

    def kfac(self, linear: Linear) -> tuple[Metric, Metric]:
        return self._of_inputs(self.owners[linear.name]), self._of_gradients(linear.name)

    def _of_inputs(self, owner: str) -> Metric:
        if self._latest is None or self._latest[0] != owner:  # one is kept: those that share an input follow each other
            tensors = self._read(f"inputs/{owner}")
            if self.asked.metric == "diagonal":
                metric = Metric(torch.diag(tensors["magnitude"].double() ** (2 * (self.asked.alpha or 0))))
            else:
                metric = Metric(damped(tensors["covariance"].double(), self.asked.damping))
            self._latest = owner, metric
        return self._latest[1]

    def _of_gradients(self, name: str) -> Metric:
        return Metric(damped(self._read(f"gradients/{name}")["covariance"].double(), self.gradient_damping))

    def _read(self, name: str) -> dict[str, Tensor]:
        tensors = read_tensors(self.covariances / f"{name}.safetensors")
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}


class Writer:
    """Factors go to disk as they come; singular values are kept for one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.singular_values: dict[str, Tensor] = {}

    def write(self, file: str, members: tuple[Linear, ...], shape: tuple[int, int], spectrum: Factored) -> dict:
        stored = {name: rows.cpu() for name, rows in spectrum.rows().items()}
        write_tensors(self.folder / f"factors/{file}.safetensors", stored)
        self.singular_values[file] = spectrum.singular_values.cpu()
        first = members[0]
        return {
            "name": first.name, "members": [m.name for m in members], "factors": file,
            "kind": first.kind, "role": first.role, "layer": first.layer,
            "out_features": shape[0], "in_features": shape[1], "base_loss": 0.0,
            "effective_rank": effective_rank(spectrum.singular_values), "n_discarded": spectrum.n_discarded,
        }  # fmt: skip


def factored(file: str, W: Tensor, H: Metric | None, G: Metric | None) -> Factored:
    try:
        return whitened_spectrum(W, H, G)
    except NotFiniteError as error:
        raise NotFiniteError(f"{file}: {error}; is the base model damaged?") from None


def unit(group: tuple[Linear, ...], metrics: Metrics, writer: Writer) -> dict[str, Any]:
    """A matrix, or several stacked, in the mean of their input metrics: the loss of the stack is that of its parts."""
    inputs, outputs = zip(*(metrics.of(linear) for linear in group), strict=True)
    name, W, H, G = group[0].name, group[0].weight.detach(), inputs[0], outputs[0]
    if len(group) > 1:
        W = torch.cat([linear.weight.detach() for linear in group])
        H = None if H is None else Metric(torch.stack([metric.covariance for metric in inputs]).mean(0))
        G = None if G is None else Metric(torch.block_diag(*(metric.covariance for metric in outputs)))
    return writer.write(name, group, (len(W), W.shape[1]), factored(name, W.float(), H, G))


def block(mlp: Mlp, cuts: tuple[float, ...], metrics: Metrics, writer: Writer) -> dict[str, Any]:
    """An MLP at every number of channels on offer."""
    H_down, G_down = metrics.kfac(mlp.down)
    H_before, _ = metrics.kfac(mlp.before[0])
    G_before = {linear.name: metrics.kfac(linear)[1].covariance for linear in mlp.before}
    W_before = {linear.name: finite(linear) for linear in mlp.before}
    kept = [round(mlp.n_channels * (1 - share)) for share in cuts]
    offered = remove_channels(finite(mlp.down), H_down.covariance, G_down, kept)
    alive = [cut.alive for cut in offered]
    grams = {name: row_grams(W, G_before[name], alive) for name, W in W_before.items()}
    described = []
    for rows, down, loss, gram in offered:
        suffix, matrices = "" if len(rows) == mlp.n_channels else f".{len(rows)}", []
        if suffix:
            stored = {"alive": rows.cpu(), "down": down.float().cpu()}
            write_tensors(writer.folder / f"cuts/{mlp.name}.{len(rows)}.safetensors", stored)
        for linear in mlp.before:
            of_rows, file, n = next(grams[linear.name]), linear.name + suffix, linear.in_features
            if len(rows) > n:
                spectrum = gram_spectrum(of_rows, H_before)
            else:
                G = G_before[linear.name][rows][:, rows]
                spectrum = factored(file, W_before[linear.name][rows].float(), H_before, Metric(G))
            matrices.append(writer.write(file, (linear,), (len(rows), n), spectrum))
        file, out = mlp.down.name + suffix, mlp.down.out_features
        if out <= len(rows):
            spectrum = gram_spectrum(gram, G_down)
        else:
            spectrum = factored(file, down.float(), Metric(H_down.covariance[rows][:, rows]), G_down)
        matrices.append(writer.write(file, (mlp.down,), (out, len(rows)), spectrum) | {"base_loss": loss})
        described.append({"channels": len(rows), "matrices": matrices})
    return {"name": mlp.name, "channels": mlp.n_channels, "cuts": described}


def finite(linear: Linear) -> Tensor:
    weight = linear.weight.detach()
    if bad := int((~torch.isfinite(weight)).sum()):
        raise NotFiniteError(
            f"{linear.name}: {bad} of {weight.numel()} entries of the weight are NaN or infinite; is "
            f"the base model damaged?"
        )
    return weight


def sensitivity(
    model: Any,
    linears: list[Linear],
    writer: Writer,
    windows: Tensor,
    ratios: tuple[float, ...],
    batch_windows: int,
    bar: Callable[[Iterable[Linear]], Iterable[Linear]],
) -> dict[str, dict[float, float]]:
    """Perplexity with one linear truncated at a time, at the rank that two factors have for each ratio."""
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}

    def rank(name: str, ratio: float) -> int | None:
        affordable = int(ratio * math.prod(sizes[name]) / sum(sizes[name]) + 1e-6)
        return min(affordable, len(writer.singular_values[name])) or None

    def vectors(name: str, rank: int) -> dict[str, Tensor]:
        return read_rows(writer.folder / f"factors/{name}.safetensors", rank)

    return measure_sensitivity(model, linears, vectors, windows, ratios, batch_windows, rank, bar)


if __name__ == "__main__":
    run_stage(main)
