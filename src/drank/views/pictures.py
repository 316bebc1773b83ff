"""Where ranks, parameters and loss are, as pictures. Takes allocations and spectra, returns figures; knows no files."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from drank.views.matrices import CHANNELS, Allocation, by_layer, matrices

FEW = 12  # up to so many variants are named in pictures and have large panels
SMALLEST_SHARE = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """Cached factors as the pictures need them.

    Attributes:
        metric: what the error is measured in: none, diagonal, input or kfac.
        energies: squared singular values by file of factors, descending.
        matrices: kind and layer of each file that holds a whole matrix (removed channels have files of their own).
    """

    metric: str
    energies: Mapping[str, np.ndarray]
    matrices: Mapping[str, tuple[str, int]]

    @classmethod
    def of(cls, summary: Mapping[str, Any], singular_values: Mapping[str, np.ndarray]) -> "Spectrum":
        """That of a spectrum's summary.json and singular_values.safetensors."""
        whole = [matrix for block in summary["blocks"] for matrix in block["cuts"][0]["matrices"]]
        matrices = {row["factors"]: (row["kind"], row["layer"]) for row in summary["units"] + whole}
        return cls(summary["metric"], {file: s**2 for file, s in singular_values.items()}, matrices)


def rank_heat_map(allocations: Sequence[Allocation]) -> Figure:
    """Share of the full rank by layer (down) and kind of matrix (across), a panel per variant; dense units are 1.

    The column "channels" has the share of its channels that an MLP kept, where they could be removed.
    """
    panels = {}
    for allocation in allocations:
        rows = matrices(allocation)
        rows["share"] = rows["rank"] / rows["full_rank"]
        panels[allocation["variant"]] = f"kept {allocation['kept_ratio']:.3f}", by_layer(rows, "share", "mean")
    return heat_maps(panels, "viridis", Normalize(0, 1), "rank / full rank (dense = 1)")


def budget(allocations: Sequence[Allocation]) -> Figure:
    """Share of the parameters kept, a row per variant: by kind (slots as wide as in the dense model), and by layer."""
    figure = Figure(figsize=(12, 1.3 + 0.21 * len(allocations)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kinds = list(dict.fromkeys(unit["kind"] for unit in allocations[0]["units"]))
    layers = []
    for row, allocation in enumerate(allocations):
        kept, whole = (by_layer(matrices(allocation), column)[kinds] for column in ("price", "size"))
        layers.append(kept.sum(axis=1) / whole.sum(axis=1))
        widths = whole.sum() / whole.sum().sum()
        shares, starts = kept.sum() / whole.sum(), widths.cumsum() - widths
        colors = [colormaps["Set2"](number % 8) for number in range(len(kinds))]
        left.barh([row] * len(kinds), widths, left=starts, color=colors, alpha=0.3, height=0.8, edgecolor="white")
        left.barh([row] * len(kinds), widths * shares, left=starts, color=colors, height=0.8)
        for start, width, share in zip(starts, widths, shares, strict=True):
            if share < 0.995 and width > 0.02:  # a full slot says it already
                left.text(start + width / 2, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    left.set_xticks(starts + widths / 2, [_short(kind) for kind in kinds], fontsize=8)
    left.xaxis.tick_top()
    left.set_xlim(0, 1)
    left.set_yticks(
        range(len(allocations)), [f"{a['variant']}   {a['kept_ratio']:.3f}" for a in allocations], fontsize=8
    )
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    n_layers = 1 + max(int(shares.index.max()) for shares in layers)
    shares_by_layer = pd.DataFrame(layers).reindex(columns=range(n_layers))
    image = right.imshow(shares_by_layer, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    right.set_ylim(len(allocations) - 0.5, -0.5)
    right.set_xlabel("layer", fontsize=8)
    right.locator_params("x", integer=True)
    right.tick_params(length=0, labelsize=8, labelleft=False)
    shrink = min(1.0, FEW / len(allocations))
    bar = figure.colorbar(image, ax=right, shrink=shrink, anchor=(0, 1), aspect=min(20, 2 + 2 * len(allocations)))
    bar.set_label("share of the layer kept", fontsize=8)
    return figure


def losses(allocation: Allocation, spectrum: Spectrum) -> pd.DataFrame:
    """Energy dropped by layer (index) and kind (columns), in the unit of the metric; the sum is the whole loss.

    A unit's is relative_loss (Σ_i s_i² + base_loss). The base_loss of an MLP's last matrix is what removed channels
    cost; no rank's doing, it has a column of its own, "channels". A basis that several layers share counts for them in
    equal parts.
    """
    rows = matrices(allocation)
    energy = rows["factors"].map(lambda file: float(spectrum.energies[file].sum()), na_action="ignore")
    by_rank = rows["relative_loss"] * (energy + rows["base_loss"]) - rows["base_loss"]
    by_rank = by_rank.clip(lower=0.0).where(rows["form"] != "dense", 0.0) / rows["sharing"]
    rows["loss"] = rows["base_loss"].where(rows["form"] == CHANNELS, by_rank)
    return by_layer(rows, "loss")


def loss_heat_map(allocations: Sequence[Allocation], spectra: Mapping[str, Spectrum]) -> Figure:
    """Share of the summed loss by layer and kind, a panel per variant; what loses nothing is white.

    Above a panel the sum: predicted nats per token (half the energy, docs/method.md) for kfac; for other metrics, which
    do not measure the loss, the energy dropped as a share of all.
    """
    panels = {}
    for allocation in allocations:
        spectrum = spectra[allocation["spectrum"]]
        table = losses(allocation, spectrum)
        total = float(table.sum().sum())
        if spectrum.metric == "kfac":
            title = f"kfac: {total / 2:.3g} nats a token"
        else:
            energy = sum(float(spectrum.energies[unit["factors"]].sum()) for unit in allocation["units"])
            title = f"{spectrum.metric}: {100 * total / (energy or 1.0):.2g} % of energy"
        panels[allocation["variant"]] = title, (table / (total or 1.0)).replace(0.0, np.nan)
    return heat_maps(panels, "magma_r", LogNorm(SMALLEST_SHARE, 1), "share of the summed loss")


def spectrum_curves(spectrum: Spectrum) -> Figure:
    """Share of the energy beyond rank k against k / full rank, a panel per kind, a line per layer (dark ones first)."""
    kinds = list(dict.fromkeys(kind for kind, _ in spectrum.matrices.values()))
    figure = Figure(figsize=(min(12, 0.6 + 2 * len(kinds)), 2.6), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    last = max(layer for _, layer in spectrum.matrices.values()) or 1
    for file, (kind, layer) in spectrum.matrices.items():
        e = spectrum.energies[file]
        tail = np.append(e[::-1].cumsum()[::-1], 0.0) / max(float(e.sum()), np.finfo(float).tiny)
        panel = axes[kinds.index(kind)]
        panel.semilogy(
            np.linspace(0, 1, len(tail)), tail.clip(1e-8), color=colormaps["viridis"](layer / last), linewidth=0.7
        )
    for kind, panel in zip(kinds, axes, strict=True):
        panel.set_title(_short(kind), fontsize=9)
        panel.tick_params(labelsize=8)
    axes[0].set_ylim(1e-6, 1.2)
    axes[0].yaxis.set_minor_locator(NullLocator())  # which takes longer to lay out than all else here
    axes[0].set_ylabel("energy beyond k", fontsize=8)
    figure.supxlabel("k / full rank", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes (no date, no version inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def heat_maps(panels: Mapping[str, tuple[str, pd.DataFrame]], cmap: str, norm: Normalize, label: str) -> Figure:
    """A panel per variant (second line of its title, table), all with the same columns; white where nothing is."""
    few = len(panels) <= FEW
    across = min(len(panels), 6 if few else 8)
    down = math.ceil(len(panels) / across)
    kinds = list(dict.fromkeys(kind for _, table in panels.values() for kind in table.columns if kind != CHANNELS))
    if any(CHANNELS in table.columns for _, table in panels.values()):
        kinds.append(CHANNELS)
    n_layers = 1 + max(int(table.index.max()) for _, table in panels.values())
    height = float(np.clip(0.13 * n_layers, 1.2, 4)) + 1 if few else 1.7
    width = float(np.clip(11 / across, 1.85, 2.6)) if few else 1.42
    figure = Figure(figsize=(1 + width * across, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, (title, table)) in zip(grid, panels.items(), strict=False):
        values = table.reindex(index=range(n_layers), columns=kinds).to_numpy(float)
        image = axes.imshow(values, norm=norm, aspect="auto", cmap=cmap)
        axes.set_title(f"{name}\n{title}", fontsize=9 if few else 7)
        axes.set_xticks(range(len(kinds)), [_short(kind) for kind in kinds], rotation=90)
        axes.tick_params(labelsize=8 if few else 6, length=2)
        if kinds[-1] == CHANNELS:
            axes.axvline(len(kinds) - 1.5, color="white", linewidth=2)
    grid[0].locator_params("y", integer=True)  # all panels share it
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=list(grid), label=label, format="{x:g}", shrink=max(0.25, 0.9 / down), anchor=(0, 1))
    return figure


def _short(kind: str) -> str:
    return kind.removesuffix("_proj")
