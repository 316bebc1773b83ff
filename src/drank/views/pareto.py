"""Quality against size: token perplexities of a table of variants over their bytes, and the Pareto frontier."""

import math

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from drank.views.pictures import FEW

HIGHEST_RATIO = 32
RATIOS = (1, 1.5, 2, 3, 5, 10, 20, 30)
FINE_RATIOS = (1, 1.1, 1.2, 1.35, 1.5, 2, 3, 5)
NATS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3)
LINEAR_NATS = 0.01  # the scale is linear below, logarithmic above


def perplexity_by_size(table: pd.DataFrame) -> Figure:
    """Token perplexity over the dense model's against bytes on disk, a panel per text, with the Pareto frontier.

    Plain perplexities where no dense variant was run. Beyond HIGHEST_RATIO nobody would use the model, and the scale
    would hide the differences below: not drawn. Few variants are named, many have a legend of presets.
    """
    columns = perplexity_columns(table)
    few, across = len(table) <= FEW, min(len(columns), 2)
    down = math.ceil(len(columns) / across)
    figure = Figure(figsize=(5 * across + (0.5 if few else 2.4), (3.8 if few else 4.6) * down), layout="constrained")
    for index, column in enumerate(columns):
        axes = figure.add_subplot(down, across, index + 1)
        base = reference(table, column)
        megabytes, ratios = table["bytes"] / 1e6, table[column] / (base or 1.0)
        best = frontier(megabytes, ratios)
        axes.plot(megabytes[best], ratios[best], color="0.8", linewidth=7, alpha=0.7, zorder=1,
                  solid_capstyle="round", label="Pareto frontier")  # fmt: skip
        for number, (preset, rows) in enumerate(table.groupby("preset", sort=False)):
            order = rows.sort_values("bytes").index
            axes.plot(megabytes[order], ratios[order], color=colormaps["tab10"](number % 10), linewidth=1.2,
                      marker="osD^vP"[number // 10 % 6], markersize=5, label=str(preset))  # fmt: skip
        axes.set_yscale("log")
        axes.grid(visible=True, linewidth=0.3)
        axes.set_title(column.removeprefix("token_perplexity/"), fontsize=10)
        axes.set_xlabel("megabytes on disk")
        axes.set_ylabel("token perplexity / dense" if base is not None else "token perplexity")
        if base is not None:
            lowest, highest = min(0.93, float(ratios.min()) * 0.95), min(float(ratios.max()) * 1.15, HIGHEST_RATIO)
            axes.set_ylim(lowest, highest)
            axes.set_yticks([tick for tick in (RATIOS if highest > 5 else FINE_RATIOS) if lowest < tick < highest])
            axes.set_yticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
        if few:
            left, right = axes.get_xlim()
            axes.set_xlim(left, right + 0.2 * (right - left))  # falling curves leave room above to the right
            for name, x, y in zip(table["variant"], megabytes, ratios, strict=True):
                if y <= axes.get_ylim()[1]:
                    axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if few:
        figure.axes[0].legend(handles[:1], labels[:1], fontsize=8, frameon=False)
    else:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def nats_by_bytes(table: pd.DataFrame, source: tuple[str, int] | None = None) -> Figure:
    """Nats per token over the dense model's against all bytes on disk, a panel per text, a series per precision.

    The line of a series joins those of its variants that none of it beats. A table without a dense variant has no such
    nats. Beyond log HIGHEST_RATIO nothing is drawn.

    Args:
        table: with a column `bits`.
        source: name and bytes of the file that the dense model was dequantised from, which loses nothing.
    """
    columns = perplexity_columns(table)
    figure = Figure(figsize=(5.6 * len(columns) + 1.8, 4.6), layout="constrained")
    series = table.apply(_precision, axis=1)
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        megabytes, nats = table["bytes"] / 1e6, np.log(table[column] / (reference(table, column) or np.nan))
        if source:
            axes.axvline(source[1] / 1e6, color="0.75", linewidth=0.8, zorder=0)
            axes.plot(source[1] / 1e6, 0, color="black", marker="*", markersize=11, linestyle="", label=source[0])
        for number, (name, rows) in enumerate(table.groupby(series, sort=False)):
            x, y, color = megabytes[rows.index], nats[rows.index], colormaps["tab10"](number % 10)
            best = frontier(x, y)
            axes.plot(x[best], y[best], color=color, linewidth=1.2)
            axes.plot(x, y, color=color, marker="osD^vP"[number % 6], markersize=5, linestyle="", label=str(name))
        axes.set_yscale("symlog", linthresh=LINEAR_NATS)
        highest = min(nats.max() * 1.4 + LINEAR_NATS, math.log(HIGHEST_RATIO))
        axes.set_ylim(min(-LINEAR_NATS / 2, nats.min() * 1.2), highest)
        axes.set_yticks([tick for tick in NATS if tick < highest])
        axes.set_yticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, linewidth=0.3)
        axes.set_title(column.removeprefix("token_perplexity/"), fontsize=10)
        axes.set_xlabel("megabytes on disk, all weights")
        if len(table) <= FEW:
            left, right = axes.get_xlim()
            axes.set_xlim(left, right + 0.15 * (right - left))
            for name, x, y in zip(table["variant"], megabytes, nats, strict=True):
                if y <= axes.get_ylim()[1]:
                    axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    figure.axes[0].set_ylabel("nats per token over dense")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _precision(row: pd.Series) -> str:
    """The series of a variant: of a dense model, rounded or not; of truncated ones by bits; or mixed."""
    if row["bits"] == "mixed":
        return "mixed"
    if row["kept_ratio"] < 1:
        return f"low rank, {row['bits']} bits"
    return "dense, 16 bits" if row["bits"] == 16 else "dense, rounded"


def frontier(sizes: pd.Series, values: pd.Series) -> pd.Index:
    """Labels of the points that none beats, by ascending size.

    A point is beaten by one that is no larger in size and in value, and smaller in one of the two. The first of equal
    points is named; one without a value (NaN) is none.
    """
    points = pd.DataFrame({"size": sizes, "value": values}).dropna().sort_values(["size", "value"], kind="stable")
    return points.index[points["value"] < points["value"].cummin().shift(fill_value=math.inf)]


def perplexity_columns(table: pd.DataFrame) -> list[str]:
    """Columns of the token perplexities, one per text."""
    return [column for column in table.columns if column.startswith("token_perplexity/")]


def reference(table: pd.DataFrame, column: str) -> float | None:
    """The dense model's figure; None where no dense variant was run."""
    dense = table.loc[table["preset"] == "dense", column]
    return float(dense.iloc[0]) if len(dense) else None
