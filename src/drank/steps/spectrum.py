"""Spectrum: singular values in the metric, effective ranks, and the vectors that any rank is sliced from."""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drank.method.channels import remove_channels, row_grams
from drank.method.covariance import NotFiniteError
from drank.method.metrics import METRICS, UNITS
from drank.method.spectrum import Metric, effective_rank, gram_spectrum, whitened_spectrum
from drank.method.spectrum import Spectrum as Factored
from drank.model.groups import Mlp, find_groups, find_mlps
from drank.model.linears import Linear
from drank.model.substitution import measure_sensitivity
from drank.project.params import Spectrum
from drank.project.processes import Group

Tensors = Mapping[str, Tensor]


class Metrics:
    """Input and output metric of a linear; None is the identity. Linears that share their input share its metric.

    Args:
        covariances: what the step ``covariance`` stored.
        owners: for every linear the one under whose name its input is stored.
    """

    def __init__(
        self, asked: Spectrum, covariances: Mapping[str, Tensors], owners: Mapping[str, str], device: str = "cpu"
    ) -> None:
        self.row, self.given = METRICS[asked.metric], asked.model_dump()
        self.covariances, self.owners, self.device = covariances, owners, device
        self._latest: tuple[str, Metric] | None = None

    def of(self, linear: Linear) -> tuple[Metric | None, Metric | None]:
        owner = self.owners[linear.name]
        # One is kept: linears that share an input follow each other.
        if self.row.inputs and (self._latest is None or self._latest[0] != owner):
            self._latest = owner, Metric(self.row.inputs(self._read(f"inputs/{owner}"), self.given))
        gradients = self.row.gradients
        G = gradients and Metric(gradients(self._read(f"gradients/{linear.name}"), self.given))
        return self._latest[1] if self._latest else None, G

    def _read(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.to(self.device) for key, tensor in self.covariances[name].items()}


class Writer:
    """Factors go to the store as they come; singular values are kept for one file."""

    def __init__(self, store: MutableMapping[str, Tensors]) -> None:
        self.store = store
        self.singular_values: dict[str, Tensor] = {}

    def write(self, file: str, members: tuple[Linear, ...], shape: tuple[int, int], spectrum: Factored) -> dict:
        self.store[f"factors/{file}"] = {name: rows.cpu() for name, rows in spectrum.rows().items()}
        self.singular_values[file] = spectrum.singular_values.cpu()
        first = members[0]
        return {
            "name": first.name, "members": [m.name for m in members], "factors": file,
            "kind": first.kind, "role": first.role, "layer": first.layer,
            "out_features": shape[0], "in_features": shape[1], "base_loss": 0.0,
            "effective_rank": effective_rank(spectrum.singular_values), "n_discarded": spectrum.n_discarded,
        }  # fmt: skip


def factorise(
    model: Any,
    linears: Sequence[Linear],
    asked: Spectrum,
    metrics: Metrics,
    group: Group,
    writer: Writer,
    progress: Callable[..., Any],
) -> dict[str, Any]:
    """Factors of every unit into the writer's store: ``factors/<file>``, and ``cuts/<MLP>.<channels>`` of blocks.

    Returns:
        ``units`` and ``blocks``, rows that describe them; all processes' singular values are then in the writer.
    """
    row = UNITS[asked.units]
    mlps = find_mlps(model, linears) if row.loses_channels else []
    in_mlps = {linear.name for mlp in mlps for linear in (*mlp.before, mlp.down)}
    single = [linear for linear in linears if linear.name not in in_mlps]
    groups = find_groups(single, asked.layers, asked.even_with_grouped_heads)
    members = [(*mlp.before, mlp.down) for mlp in mlps]
    units = {i: unit(groups[i], metrics, writer) for i in progress(_shared_out(groups, group), unit="units")}
    blocks = {
        i: block(mlps[i], asked.cuts, metrics, writer) for i in progress(_shared_out(members, group), unit="MLPs")
    }
    described = {
        "units": _in_order(group.gather(list(units.items()))),
        "blocks": _in_order(group.gather(list(blocks.items()))),
    }
    values = {name: values.tolist() for name, values in writer.singular_values.items()}
    for others in group.gather(values):
        writer.singular_values |= {name: torch.tensor(v, dtype=torch.float64) for name, v in others.items()}
    return described


def unit(group: tuple[Linear, ...], metrics: Metrics, writer: Writer) -> dict[str, Any]:
    """A matrix, or several stacked, in the mean of their input metrics: the loss of the stack is that of its parts."""
    inputs, outputs = zip(*(metrics.of(linear) for linear in group), strict=True)
    name, W, H, G = group[0].name, group[0].weight.detach(), inputs[0], outputs[0]
    if len(group) > 1:
        W = torch.cat([linear.weight.detach() for linear in group])
        H = None if H is None else Metric(torch.stack([metric.covariance for metric in inputs]).mean(0))
        G = None if G is None else Metric(torch.block_diag(*(metric.covariance for metric in outputs)))
    return writer.write(name, group, (len(W), W.shape[1]), _factored(name, W.float(), H, G))


def block(mlp: Mlp, cuts: tuple[float, ...], metrics: Metrics, writer: Writer) -> dict[str, Any]:
    """An MLP at every number of channels on offer."""
    H_down, G_down = _both(metrics, mlp.down)
    H_before, _ = _both(metrics, mlp.before[0])
    G_before = {linear.name: _both(metrics, linear)[1].covariance for linear in mlp.before}
    W_before = {linear.name: _finite(linear) for linear in mlp.before}
    kept = [round(mlp.n_channels * (1 - share)) for share in cuts]
    offered = remove_channels(_finite(mlp.down), H_down.covariance, G_down, kept)
    alive = [cut.alive for cut in offered]
    grams = {name: row_grams(W, G_before[name], alive) for name, W in W_before.items()}
    described = []
    for rows, down, loss, gram in offered:
        suffix, matrices = "" if len(rows) == mlp.n_channels else f".{len(rows)}", []
        if suffix:
            writer.store[f"cuts/{mlp.name}.{len(rows)}"] = {"alive": rows.cpu(), "down": down.float().cpu()}
        for linear in mlp.before:
            of_rows, file, n = next(grams[linear.name]), linear.name + suffix, linear.in_features
            if len(rows) > n:
                spectrum = gram_spectrum(of_rows, H_before)
            else:
                G = G_before[linear.name][rows][:, rows]
                spectrum = _factored(file, W_before[linear.name][rows].float(), H_before, Metric(G))
            matrices.append(writer.write(file, (linear,), (len(rows), n), spectrum))
        file, out = mlp.down.name + suffix, mlp.down.out_features
        if out <= len(rows):
            spectrum = gram_spectrum(gram, G_down)
        else:
            spectrum = _factored(file, down.float(), Metric(H_down.covariance[rows][:, rows]), G_down)
        matrices.append(writer.write(file, (mlp.down,), (out, len(rows)), spectrum) | {"base_loss": loss})
        described.append({"channels": len(rows), "matrices": matrices})
    return {"name": mlp.name, "channels": mlp.n_channels, "cuts": described}


def sensitivity(
    model: Any,
    linears: Sequence[Linear],
    singular_values: Mapping[str, Tensor],
    read_vectors: Callable[[str, int], Tensors],
    windows: Tensor,
    ratios: tuple[float, ...],
    batch_windows: int,
    progress: Callable[[Iterable[Linear]], Iterable[Linear]],
) -> dict[str, dict[float, float]]:
    """Perplexity with one linear truncated at a time, at the rank that two factors have for each ratio."""
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}

    def rank(name: str, ratio: float) -> int | None:
        affordable = int(ratio * math.prod(sizes[name]) / sum(sizes[name]) + 1e-6)
        return min(affordable, len(singular_values[name])) or None

    return measure_sensitivity(model, linears, read_vectors, windows, ratios, batch_windows, rank, progress)


def _both(metrics: Metrics, linear: Linear) -> tuple[Metric, Metric]:
    H, G = metrics.of(linear)
    assert H is not None, "params.yaml has units that lose channels with metrics of both sides alone"
    assert G is not None
    return H, G


def _factored(file: str, W: Tensor, H: Metric | None, G: Metric | None) -> Factored:
    try:
        return whitened_spectrum(W, H, G)
    except NotFiniteError as error:
        raise NotFiniteError(f"{file}: {error}; is the base model damaged?") from None


def _finite(linear: Linear) -> Tensor:
    weight = linear.weight.detach()
    if bad := int((~torch.isfinite(weight)).sum()):
        raise NotFiniteError(
            f"{linear.name}: {bad} of {weight.numel()} entries of the weight are NaN or infinite; is "
            f"the base model damaged?"
        )
    return weight


def _shared_out(units: Sequence[tuple[Linear, ...]], group: Group) -> list[int]:
    """Indices of the units that this process takes: in turn by size, so that all have as much to do."""

    def flops(i: int) -> int:
        return sum(a.out_features * a.in_features * min(a.out_features, a.in_features) for a in units[i])

    return sorted(sorted(range(len(units)), key=flops, reverse=True)[group.share])


def _in_order(parts: list[list[tuple[int, Any]]]) -> list[Any]:
    """What the processes found by index, as one list."""
    return [found for _, found in sorted((i, found) for part in parts for i, found in part)]
