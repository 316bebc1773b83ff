"""Spectrum: singular values in the metric, effective ranks, and the vectors that any rank is sliced from."""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

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


def factorise(
    model: Any,
    asked: Spectrum,
    on: Covariance,
    covariances: Mapping[str, Tensors],
    described: Mapping[str, Any],
    group: Group,
    store: MutableMapping[str, Tensors],
    progress: Callable[..., Any],
) -> Row:
    """Factors of every unit into ``store``: ``factors/<file>``, ``cuts/<MLP>.<channels>``, ``singular_values``.

    Args:
        on: targets, and device.
        covariances: the tensors that the step ``covariance`` stored; ``described`` is its summary.
        progress: wraps what is found, with ``total`` and ``unit``, the name of the parts.

    Returns:
        The summary: the metric, ``computed_in``, ``left_dense``, and rows that describe ``units`` and ``blocks``.
    """
    linears, row = find_linears(model, on.targets, on.ignore), UNITS[asked.units]
    owners, writer = described["owners"], _Writer(store, asked)
    mlps = find_mlps(model, linears) if row.loses_channels else []
    members = [(*mlp.before, mlp.down) for mlp in mlps]
    in_mlps = {linear.name for matrices in members for linear in matrices}
    single = [linear for linear in linears if linear.name not in in_mlps]
    groups = find_groups(single, asked.layers, asked.even_with_grouped_heads)

    def metrics() -> _Metrics:
        return _Metrics(asked, covariances, owners, on.device)

    def of_input(indices: list[int]) -> list[tuple[int, Row]]:
        shared = metrics()
        return [(i, _unit(groups[i], shared, writer)) for i in indices]

    def of_mlp(i: int) -> tuple[int, Row]:
        return i, _block(mlps[i], asked.cuts, metrics(), writer)

    mine, mlps_of_mine = _shared_out(groups, group), _shared_out(members, group)
    inputs = [list(same) for _, same in groupby(mine, lambda i: owners[groups[i][0].name])]
    # A GPU has one matrix at a time.
    width = max(max(x.out_features, x.in_features) for x in linears) if on.device == "cpu" else math.inf
    rows = progress(side_by_side(of_input, inputs, width), total=len(inputs), unit="inputs")
    units = [row for some in rows for row in some]
    blocks = list(progress(side_by_side(of_mlp, mlps_of_mine, width), total=len(mlps_of_mine), unit="MLPs"))
    values = {name: values.tolist() for name, values in writer.singular_values.items()}
    parts = group.gather([units, blocks, values])
    if group.is_first:
        found = {name: s for *_, values in parts for name, s in values.items()}
        store["singular_values"] = {name: torch.tensor(s, dtype=torch.float64) for name, s in sorted(found.items())}
    return {
        "metric": asked.metric, "damping": asked.damping, "gradient_damping": asked.gradients_damped_by,
        "computed_in": {"covariance": described["dtype"]}, "left_dense": described["left_dense"],
        "units": _in_order(part for part, *_ in parts), "blocks": _in_order(part for _, part, _ in parts),
        **({"rest": _rest(model, linears)} if asked.bits else {}),
    }  # fmt: skip


def _rest(model: Any, linears: Sequence[Linear]) -> Row:
    """Numbers of the model outside the linears: rows and columns of its embeddings, and how many others."""
    targeted = {id(linear.weight) for linear in linears}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(table.weight): list(table.weight.shape) for table in tables if table is not None}
    others = {id(p): p.numel() for p in model.parameters()}
    numbers = sum(n for key, n in others.items() if key not in targeted and key not in embeddings)
    return {"embeddings": list(embeddings.values()), "others": numbers}


def add_sensitivity(
    summary: Row,
    model: Any,
    asked: Spectrum,
    on: Covariance,
    read_rows: Callable[[str, int], Tensors],
    windows: Tensor,
    group: Group,
    progress: Callable[..., Any],
) -> None:
    """Into the summary, ``sensitivity``: perplexity with one linear truncated, at two factors' rank for each ratio.

    Where ``asked.sensitivity_scores`` says so it is ``divergence``, from the predictions of the model as it is.

    Args:
        read_rows: the first rows of what :func:`factorise` stored under a name.
        windows: calibration windows, as many as are asked for.
    """
    check_windows(model, windows, f"data/sampling/calibration/{asked.calibration_seed}.safetensors")
    linears = find_linears(model, on.targets, on.ignore)
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}
    components = {row["name"]: min(sizes[row["name"]]) - row["n_discarded"] for row in summary["units"]}

    def rank(name: str, ratio: float) -> int | None:
        affordable = int(ratio * math.prod(sizes[name]) / sum(sizes[name]) + 1e-6)
        return min(affordable, components[name]) or None

    def perplexity_now() -> float:
        return perplexity(window_nats(model, windows, on.batch_windows), windows.shape[1])

    diverges = asked.sensitivity_scores == "divergence"
    score = partial(divergence_from(model, windows.to(model.device)), model) if diverges else perplexity_now
    found = measure_sensitivity(
        model, linears[group.share], lambda name, k: read_rows(f"factors/{name}", k), score,
        asked.sensitivity_ratios, rank, lambda items: progress(items, unit="matrices"),
    )  # fmt: skip
    key = "divergence" if diverges else "sensitivity"
    summary[key] = {name: scores for part in group.gather(found) for name, scores in part.items()}
    summary["computed_in"][key] = name_of(model.dtype)


class _Metrics:
    """Input and output metric of a linear; None is the identity. Linears that share their input share its metric.

    Args:
        owners: for every linear the one under whose name its input is stored.
    """

    def __init__(
        self, asked: Spectrum, covariances: Mapping[str, Tensors], owners: Mapping[str, str], device: str
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

    def both(self, linear: Linear) -> tuple[Metric, Metric]:
        H, G = self.of(linear)
        assert H is not None, "params.yaml has units that lose channels with metrics of both sides alone"
        assert G is not None
        return H, G

    def _read(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.to(self.device) for key, tensor in self.covariances[name].items()}


class _Writer:
    """Factors go to the store as they come; singular values are kept for one file.

    Args:
        asked: its bits are those that losses of rounding are described for.
    """

    def __init__(self, store: MutableMapping[str, Tensors], asked: Spectrum) -> None:
        self.store = store
        self.grids = [Grid(bits, asked.group_size or GROUP) for bits in asked.bits or ()]
        self.singular_values: dict[str, Tensor] = {}

    def rounded(self, weight: Tensor, H: Metric | None, inputs: Tensor | slice = slice(None)) -> list[Tensor]:
        """Loss of rounding every row to each number of bits, before the gradients weigh it.

        Args:
            inputs: those of the metric that the weight has columns for.
        """
        if not self.grids:
            return []
        assert H is not None, "params.yaml has bits with metrics of both sides alone"
        return expected_by_row(weight, self.grids, H.covariance[inputs][:, inputs])

    def write(
        self, file: str, members: tuple[Linear, ...], shape: tuple[int, int], spectrum: Factored,
        rounded: Sequence[Tensor] = (), gradients: Tensor | None = None,
    ) -> Row:  # fmt: skip
        """One matrix: its factors into the store, its row of the summary.

        Args:
            rounded: see :meth:`rounded`; ``gradients`` has the diagonal of G for the same rows.
        """
        self.store[f"factors/{file}"] = {name: rows.cpu() for name, rows in spectrum.rows().items()}
        self.singular_values[file] = spectrum.singular_values.cpu()
        first = members[0]
        return {
            "name": first.name, "members": [m.name for m in members], "factors": file,
            "kind": first.kind, "role": first.role, "layer": first.layer,
            "out_features": shape[0], "in_features": shape[1], "base_loss": 0.0,
            "effective_rank": effective_rank(spectrum.singular_values), "n_discarded": spectrum.n_discarded,
            **self._rounding(rounded, gradients),
        }  # fmt: skip

    def _rounding(self, rounded: Sequence[Tensor], gradients: Tensor | None) -> Row:
        """Losses of rounding in the unit of dropped energies, which are twice the nats."""
        if not rounded or gradients is None:
            return {}
        nats = {str(grid.bits): float(gradients @ rows) for grid, rows in zip(self.grids, rounded, strict=True)}
        return {"rounding": {bits: 2 * lost for bits, lost in nats.items()}}


def _unit(group: tuple[Linear, ...], metrics: _Metrics, writer: _Writer) -> Row:
    """A matrix, or several stacked, in the mean of their input metrics: the loss of the stack is that of its parts."""
    inputs, outputs = zip(*(metrics.of(linear) for linear in group), strict=True)
    name, W, H, G = group[0].name, group[0].weight.detach(), inputs[0], outputs[0]
    if len(group) > 1:
        W = torch.cat([linear.weight.detach() for linear in group])
        H = None if H is None else Metric(torch.stack([metric.covariance for metric in inputs]).mean(0))
        G = None if G is None else Metric(torch.block_diag(*(metric.covariance for metric in outputs)))
    with _named(name):
        spectrum, rounded = whitened_spectrum(W.float(), H, G), writer.rounded(W.float(), H)
        gradients = None if G is None else G.covariance.diagonal()
        return writer.write(name, group, (len(W), W.shape[1]), spectrum, rounded, gradients)


def _block(mlp: Mlp, cuts: tuple[float, ...], metrics: _Metrics, writer: _Writer) -> Row:
    """An MLP at every number of channels on offer."""
    H_down, G_down = metrics.both(mlp.down)
    H_before, _ = metrics.both(mlp.before[0])
    G_before = {linear.name: metrics.both(linear)[1].covariance for linear in mlp.before}
    W = {}
    for linear in (*mlp.before, mlp.down):
        with _named(linear.name):
            W[linear.name] = finite(linear.weight.detach(), "weight")
    kept = [round(mlp.n_channels * (1 - share)) for share in cuts]
    offered = remove_channels(W[mlp.down.name], H_down.covariance, G_down, kept)
    alive = [cut.alive for cut in offered]
    grams = {linear.name: row_grams(W[linear.name], G_before[linear.name], alive) for linear in mlp.before}
    rounded = {linear.name: writer.rounded(W[linear.name].float(), H_before) for linear in mlp.before}
    described = []
    for rows, down, loss, gram in offered:
        suffix, matrices = "" if len(rows) == mlp.n_channels else f".{len(rows)}", []
        if suffix:
            writer.store[f"cuts/{mlp.name}{suffix}"] = {"alive": rows.cpu(), "down": down.float().cpu()}
        for linear in mlp.before:
            of_rows, n = next(grams[linear.name]), linear.in_features
            if len(rows) > n:
                spectrum = gram_spectrum(of_rows, H_before)
            else:
                G = Metric(G_before[linear.name][rows][:, rows])
                spectrum = whitened_spectrum(W[linear.name][rows].float(), H_before, G)
            left, gradients = [each[rows] for each in rounded[linear.name]], G_before[linear.name].diagonal()[rows]
            shape = (len(rows), n)
            matrices.append(writer.write(linear.name + suffix, (linear,), shape, spectrum, left, gradients))
        out = mlp.down.out_features
        if out <= len(rows):
            spectrum = gram_spectrum(gram, G_down)
        else:
            spectrum = whitened_spectrum(down.float(), Metric(H_down.covariance[rows][:, rows]), G_down)
        left = writer.rounded(down.float(), H_down, rows)
        gradients, shape = G_down.covariance.diagonal(), (out, len(rows))
        row = writer.write(mlp.down.name + suffix, (mlp.down,), shape, spectrum, left, gradients)
        described.append({"channels": len(rows), "matrices": [*matrices, row | {"base_loss": loss}]})
    return {"name": mlp.name, "channels": mlp.n_channels, "cuts": described}


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{name}: {error}; is the base model damaged?") from None


def _shared_out(units: Sequence[tuple[Linear, ...]], group: Group) -> list[int]:
    """Indices of this process's units: in turn by size, so that all processes have as much to do."""

    def flops(i: int) -> int:
        return sum(a.out_features * a.in_features * min(a.out_features, a.in_features) for a in units[i])

    return sorted(sorted(range(len(units)), key=flops, reverse=True)[group.share])


def _in_order(parts: Iterator[list[tuple[int, Row]]]) -> list[Row]:
    """The rows of all processes, by index."""
    return [row for _, row in sorted((i, row) for part in parts for i, row in part)]
