"""Spectrum: singular values in the metric, effective ranks, and the vectors that any rank is sliced from."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from drank.method.channels import remove_channels, row_grams
from drank.method.covariance import NotFiniteError, finite
from drank.method.metrics import METRICS, UNITS
from drank.method.precisions import GROUP, Grid
from drank.method.rounding import expected_by_row
from drank.method.spectrum import Metric, effective_rank, gram_spectrum, whitened_spectrum
from drank.method.spectrum import Spectrum as Factored
from drank.method.threads import side_by_side
from drank.model.divergence import divergence_from
from drank.model.experts import unfuse
from drank.model.groups import Mlp, find_groups, find_mlps
from drank.model.linears import Linear, find_linears
from drank.model.perplexity import perplexity, window_nats
from drank.model.precision import name_of
from drank.model.substitution import measure_sensitivity
from drank.model.vocabulary import check_windows
from drank.project.params import Covariance, Spectrum
from drank.project.processes import Group

Tensors = Mapping[str, Tensor]
Row = dict[str, Any]
# Input and output metric of a linear; None is the identity.
Metrics = Callable[[Linear], tuple[Metric | None, Metric | None]]


@runtime_checkable
class Store(Protocol):
    """A folder of tensors, of which the first rows can be read."""

    def __setitem__(self, name: str, tensors: Tensors, /) -> None: ...
    def rows(self, name: str, n_rows: int, /) -> Tensors: ...


def factorise(
    model: Any,
    asked: Spectrum,
    on: Covariance,
    covariances: Mapping[str, Tensors],
    described: Mapping[str, Any],
    windows: Tensor,
    group: Group,
    store: Store,
) -> Row:
    """Factors of every unit into ``store``: ``factors/<file>``, ``cuts/<MLP>.<channels>``, ``singular_values``.

    Args:
        on: targets, and device.
        covariances: the tensors that the step ``covariance`` stored; ``described`` is its summary.
        windows: calibration windows, of which the sensitivity reads as many as are asked for.

    Returns:
        The summary: the metric, ``computed_in``, ``left_dense``, and rows that describe ``units`` and ``blocks``; with
        sensitivity windows, by linear and ratio ``sensitivity``, the perplexity with that linear truncated, or
        ``divergence``, how far predictions move then.
    """
    work, owners = _Work(asked, covariances, described, on.device, store), described["owners"]
    unfuse(model, owners)
    # An expert that saw too few tokens has no covariance, and stays as it is.
    linears = [linear for linear in find_linears(model, on.targets, on.ignore) if linear.name in owners]
    mlps = find_mlps(model, linears) if UNITS[asked.units].loses_channels else []
    of_mlps = [(*mlp.before, mlp.down) for mlp in mlps]
    in_mlps = {linear.name for matrices in of_mlps for linear in matrices}
    single = [linear for linear in linears if linear.name not in in_mlps]
    groups = find_groups(single, asked.layers, asked.even_with_grouped_heads)
    n, members = len(groups), [*groups, *of_mlps]

    def of_input(indices: list[int]) -> list[tuple[int, Row]]:
        metrics = work.metrics()
        return [(i, work.unit(groups[i], metrics) if i < n else work.block(mlps[i - n], metrics)) for i in indices]

    inputs = [list(same) for _, same in groupby(_shared_out(members, group), lambda i: owners[members[i][0].name])]
    # A GPU has one matrix at a time.
    width = max(max(x.out_features, x.in_features) for x in linears) if on.device == "cpu" else math.inf
    done = group.progress(side_by_side(of_input, inputs, width), desc="spectrum", total=len(inputs), unit="inputs")
    mine = [row for of_one in done for row in of_one]
    parts = group.gather([mine, {name: s.tolist() for name, s in work.singular_values.items()}])
    rows = [row for _, row in sorted((i, row) for part, _ in parts for i, row in part)]
    found = {name: s for _, values in parts for name, s in values.items()}
    if group.is_first:
        store["singular_values"] = {name: torch.tensor(s, dtype=torch.float64) for name, s in sorted(found.items())}
    computed_in, n_windows = {"covariance": described["dtype"]}, asked.sensitivity_windows
    summary = {
        "metric": asked.metric, "damping": asked.damping, "gradient_damping": asked.gradients_damped_by,
        "computed_in": computed_in, "left_dense": described["left_dense"], "units": rows[:n], "blocks": rows[n:],
        **({"rest": _rest(model, linears)} if asked.bits else {}),
    }  # fmt: skip
    if n_windows:
        sizes = {name: len(values) for name, values in found.items()}
        key = "divergence" if asked.measures("divergence") else "sensitivity"
        summary[key] = _sensitivity(model, linears, sizes, asked, on, windows[:n_windows], group, store)
        computed_in[key] = name_of(model.dtype)
    return summary


def _rest(model: Any, linears: Sequence[Linear]) -> Row:
    """Numbers of the model outside the linears: rows and columns of its embeddings, and how many others."""
    targeted = {id(linear.weight) for linear in linears}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(table.weight): list(table.weight.shape) for table in tables if table is not None}
    others = {id(p): p.numel() for p in model.parameters()}
    numbers = sum(n for key, n in others.items() if key not in targeted and key not in embeddings)
    return {"embeddings": list(embeddings.values()), "others": numbers}


def _sensitivity(
    model: Any, linears: Sequence[Linear], components: Mapping[str, int], asked: Spectrum, on: Covariance,
    windows: Tensor, group: Group, store: Store,
) -> dict[str, Any]:  # fmt: skip
    """Scores of the model with one linear truncated at a time, at two factors' rank for each ratio."""
    check_windows(model, windows, f"data/sampling/calibration/{asked.calibration_seed}.safetensors")
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}

    def rank(name: str, ratio: float) -> int | None:
        affordable = int(ratio * math.prod(sizes[name]) / sum(sizes[name]) + 1e-6)
        return min(affordable, components[name]) or None

    def perplexity_now() -> float:
        return perplexity(window_nats(model, windows, on.batch_windows), windows.shape[1])

    diverges = asked.measures("divergence")
    score = partial(divergence_from(model, windows.to(model.device)), model) if diverges else perplexity_now
    found = measure_sensitivity(
        model, linears[group.share], lambda name, k: store.rows(f"factors/{name}", k), score,
        asked.sensitivity_ratios, rank,
        lambda items: group.progress(items, desc="sensitivity", unit="matrices"),
    )  # fmt: skip
    return {name: scores for part in group.gather(found) for name, scores in part.items()}


class _Work:
    """Factors go to the store as they come; singular values are kept for one file."""

    def __init__(
        self,
        asked: Spectrum,
        covariances: Mapping[str, Tensors],
        described: Mapping[str, Any],
        device: str,
        store: Store,
    ) -> None:
        self.asked, self.store, self.device = asked, store, device
        self.covariances, self.owners = covariances, described["owners"]
        self.grids = [Grid(bits, asked.group_size or GROUP) for bits in asked.bits or ()]
        self.singular_values: dict[str, Tensor] = {}

    def metrics(self) -> Metrics:
        """Linears that share their input share its metric, for as long as the result is kept."""
        row, given = METRICS[self.asked.metric], self.asked.model_dump()

        def read(name: str) -> dict[str, Tensor]:
            return {key: tensor.to(self.device) for key, tensor in self.covariances[name].items()}

        @cache
        def of_input(owner: str) -> Metric | None:
            return Metric(row.inputs(read(f"inputs/{owner}"), given)) if row.inputs else None

        def of(linear: Linear) -> tuple[Metric | None, Metric | None]:
            G = Metric(row.gradients(read(f"gradients/{linear.name}"), given)) if row.gradients else None
            return of_input(self.owners[linear.name]), G

        return of

    def unit(self, group: tuple[Linear, ...], metrics: Metrics) -> Row:
        """A matrix, or several stacked, in the mean of their input metrics: the loss of the stack is that of its
        parts."""
        W = torch.cat([_weight(linear) for linear in group]).float()
        inputs, outputs = zip(*map(metrics, group), strict=True)
        H, G = inputs[0], outputs[0]
        if len(group) > 1:
            H = None if H is None else Metric(torch.stack([metric.covariance for metric in inputs]).mean(0))
            G = None if G is None else Metric(torch.block_diag(*(metric.covariance for metric in outputs)))
        rounding = {}
        if H is not None and G is not None:
            rounding = self.rounding(self.rounded(W, H), G.covariance.diagonal())
        return self.write(group[0].name, group, W, whitened_spectrum(W, H, G)) | rounding

    def block(self, mlp: Mlp, metrics: Metrics) -> Row:
        """An MLP at every number of channels on offer."""
        W = {linear.name: _weight(linear) for linear in (*mlp.before, mlp.down)}
        # Units that lose channels go with metrics of both sides alone (params.yaml).
        sides: dict[str, Any] = {linear.name: metrics(linear) for linear in (*mlp.before, mlp.down)}
        (H_down, G_down), (H, _) = sides[mlp.down.name], sides[mlp.before[0].name]
        kept = [round(mlp.n_channels * (1 - share)) for share in self.asked.cuts]
        offered = remove_channels(W[mlp.down.name], H_down.covariance, G_down, kept)
        alive = [cut.alive for cut in offered]
        grams = {
            x.name: row_grams(W[x.name], sides[x.name][1].covariance, [mlp.rows(x, channels) for channels in alive])
            for x in mlp.before
        }
        rounded = {linear.name: self.rounded(W[linear.name].float(), H) for linear in mlp.before}
        cuts = []
        for channels, down, loss, gram in offered:
            suffix, matrices = "" if len(channels) == mlp.n_channels else f".{len(channels)}", []
            if suffix:
                self.store[f"cuts/{mlp.name}{suffix}"] = {"alive": channels.cpu(), "down": down.float().cpu()}
            for linear in mlp.before:
                rows = mlp.rows(linear, channels)
                of_rows, weight = next(grams[linear.name]), W[linear.name][rows]
                G = sides[linear.name][1].covariance
                if len(rows) > linear.in_features:
                    spectrum = gram_spectrum(of_rows, H)
                else:
                    spectrum = whitened_spectrum(weight.float(), H, Metric(G[rows][:, rows]))
                row = self.write(linear.name + suffix, (linear,), weight, spectrum)
                by_row = [of_bits[rows] for of_bits in rounded[linear.name]]
                matrices.append(row | self.rounding(by_row, G.diagonal()[rows]))
            if len(down) <= len(channels):
                spectrum = gram_spectrum(gram, G_down)
            else:
                spectrum = whitened_spectrum(down.float(), Metric(H_down.covariance[channels][:, channels]), G_down)
            row = self.write(mlp.down.name + suffix, (mlp.down,), down, spectrum) | {"base_loss": loss}
            row |= self.rounding(self.rounded(down.float(), H_down, channels), G_down.covariance.diagonal())
            cuts.append({"channels": len(channels), "matrices": [*matrices, row]})
        return {"name": mlp.name, "channels": mlp.n_channels, "cuts": cuts}

    def rounded(self, weight: Tensor, H: Metric, inputs: Tensor | slice = slice(None)) -> list[Tensor]:
        """Loss of rounding every row to each number of bits, before the gradients weigh it.

        Args:
            inputs: those of the metric that the weight has columns for.
        """
        return expected_by_row(weight, self.grids, H.covariance[inputs][:, inputs]) if self.grids else []

    def rounding(self, by_row: Sequence[Tensor], gradients: Tensor) -> Row:
        """Losses of rounding in the unit of dropped energies, which are twice the nats.

        Args:
            gradients: the diagonal of G for the same rows.
        """
        lost = {str(grid.bits): 2 * float(gradients @ rows) for grid, rows in zip(self.grids, by_row, strict=True)}
        return {"rounding": lost} if lost else {}

    def write(self, file: str, members: tuple[Linear, ...], weight: Tensor, spectrum: Factored) -> Row:
        """One matrix: its factors into the store, its row of the summary."""
        self.store[f"factors/{file}"] = {name: rows.cpu() for name, rows in spectrum.rows().items()}
        self.singular_values[file] = spectrum.singular_values.cpu()
        first = members[0]
        return {
            "name": first.name, "members": [m.name for m in members], "factors": file,
            "kind": first.kind, "role": first.role, "layer": first.layer,
            "out_features": len(weight), "in_features": weight.shape[1], "base_loss": 0.0,
            "effective_rank": effective_rank(spectrum.singular_values), "n_discarded": spectrum.n_discarded,
        }  # fmt: skip


def _weight(linear: Linear) -> Tensor:
    try:
        return finite(linear.weight.detach(), "weight")
    except NotFiniteError as error:
        raise NotFiniteError(f"{linear.name}: {error}; is the base model damaged?") from None


def _shared_out(units: Sequence[tuple[Linear, ...]], group: Group) -> list[int]:
    """Indices of this process's units: in turn by size, so that all processes have as much to do."""

    def flops(i: int) -> int:
        return sum(a.out_features * a.in_features * min(a.out_features, a.in_features) for a in units[i])

    return sorted(sorted(range(len(units)), key=flops, reverse=True)[group.share])
