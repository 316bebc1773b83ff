"""The table of variants and the pictures. Takes rows and allocations, returns a frame and figures; knows no files."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

Allocation = Mapping[str, Any]
PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>drank: variants</title>
<style>body{font:15px sans-serif;margin:2em}table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd}img{max-width:100%}</style></head><body>
"""
PANELS_ACROSS = 7
HIGHEST_RATIO = 32
LEADING = ("variant", "preset", "size_ratio", "kept_ratio", "parameters", "bytes")


def summary(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a variant with the flat figures of its results, dense ones first, else in the order given.

    Columns: what the variant is and its sizes (LEADING), then every figure by name; empty where a variant lacks one.
    """
    flat = [{key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in rows]
    ordered = sorted(flat, key=lambda row: row["preset"] != "dense")
    figures = sorted({key for row in ordered for key in row}.difference(LEADING))
    return pd.DataFrame(ordered, columns=[*LEADING, *figures])


def rank_heat_map(allocations: Sequence[Allocation]) -> Figure:
    """Share of the full rank by layer (down) and kind of matrix (across), a panel a variant; dense units are 1."""
    columns = min(len(allocations), PANELS_ACROSS)
    rows = math.ceil(len(allocations) / columns)
    figure = Figure(figsize=(0.8 + 2.4 * columns, 5 * rows), layout="constrained")
    for index, allocation in enumerate(allocations):
        axes = figure.add_subplot(rows, columns, index + 1)
        table = _by_layer_and_kind(allocation, lambda unit: unit["rank"] / unit["full_rank"])
        image = axes.imshow(table.to_numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set_xticks(range(table.shape[1]), [kind.removesuffix("_proj") for kind in table.columns], rotation=90)
        axes.set_title(f"{allocation['variant']}\nkept {allocation['kept_ratio']:.3f}", fontsize=9)
        axes.set_ylabel("layer" if index % columns == 0 else "")
    figure.colorbar(image, ax=figure.axes, label="rank / full rank (dense = 1)")
    return figure


def spectra(energies: Mapping[str, np.ndarray], kinds: Mapping[str, str], layers: Mapping[str, int]) -> Figure:
    """Share of the energy beyond rank k against k / full rank, a panel a kind, a line a layer (dark ones first)."""
    names = list(dict.fromkeys(kinds.values()))
    figure = Figure(figsize=(2.3 * len(names), 3), layout="constrained")
    last = max(layers.values()) or 1
    for index, kind in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1, sharey=figure.axes[0] if index else None)
        for unit in (u for u in energies if kinds[u] == kind):
            e = energies[unit]
            tail = np.append(e[::-1].cumsum()[::-1], 0.0) / max(float(e.sum()), np.finfo(float).tiny)
            shade = colormaps["viridis"](layers[unit] / last)
            axes.semilogy(np.linspace(0, 1, len(tail)), tail.clip(1e-8), color=shade, linewidth=0.8)
        axes.set_title(kind, fontsize=9)
        axes.set_ylim(1e-6, 1.2)
        axes.set_xlabel("k / full rank")
    figure.axes[0].set_ylabel("energy beyond k")
    return figure


def perplexity_by_size(table: pd.DataFrame) -> Figure:
    """Token perplexity over the dense model's against bytes on disk, a panel a text, a line a preset.

    Beyond HIGHEST_RATIO nobody would use the model, and the scale would hide the differences below: not drawn.
    """
    texts = [column.split("/", 1)[1] for column in table.columns if column.startswith("token_perplexity/")]
    figure = Figure(figsize=(4.5 * len(texts) + 2, 4.2), layout="constrained")
    for index, text in enumerate(texts):
        axes = figure.add_subplot(1, len(texts), index + 1)
        column = f"token_perplexity/{text}"
        base = _reference(table, column)
        for number, (preset, rows) in enumerate(table.groupby("preset", sort=False)):
            points = rows.sort_values("bytes")
            color = colormaps["tab20"](number % 20)
            axes.plot(points["bytes"] / 1e6, points[column] / base, marker="o", label=str(preset), color=color)
        axes.set_yscale("log")
        if base != 1:
            axes.set_ylim(0.9, min(float((table[column] / base).max()) * 1.1, HIGHEST_RATIO))
        axes.set_xlabel("megabytes on disk")
        axes.set_ylabel(f"token perplexity / dense, {text}")
        axes.grid(visible=True, which="both", linewidth=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes (no date, no version inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def page(table: pd.DataFrame, pictures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page: the table of variants and every picture, with nothing to fetch."""
    images = "".join(
        f'<h2>{name}</h2>\n<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
        for name, picture in pictures.items()
    )
    rows = table.to_html(index=False, float_format=lambda value: f"{value:.4g}", border=0, na_rep="")
    return f"{PAGE_HEAD}<h1>drank: variants</h1>\n{rows}\n{images}</body></html>\n"


def _reference(table: pd.DataFrame, column: str) -> float:
    """The dense model's figure; 1 where no dense variant was run, so that plain perplexities are shown."""
    dense = table.loc[table["preset"] == "dense", column]
    return float(dense.iloc[0]) if len(dense) else 1.0


def _by_layer_and_kind(allocation: Allocation, value: Any) -> pd.DataFrame:
    rows = [
        (unit["layer"] + offset, unit["kind"], value(unit))
        for unit in allocation["units"]
        for offset in range(len(unit["members"]))  # a group holds consecutive layers
    ]
    frame = pd.DataFrame(rows, columns=["layer", "kind", "value"])
    kinds = list(dict.fromkeys(frame["kind"]))
    return frame.pivot_table(index="layer", columns="kind", values="value")[kinds]
