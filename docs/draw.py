"""The pictures of choices.md and reading-an-allocation.md, from committed results and allocations alone.

    python docs/draw.py        # writes docs/images/choice-*.png and docs/images/allocation-*.png

tests/test_reference.py draws them again and compares.
"""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drank.project.files import read_json
from drank.views.matrices import CHANNELS, Allocation, matrices
from drank.views.pictures import png, rank_heat_map

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = REPOSITORY / "docs/images"


def allocation(name: str, root: str = "study/") -> Allocation:
    return read_json(REPOSITORY / f"{root}data/allocation/{name}.json")


def perplexity_ratio(name: str, text: str = "news") -> float:
    """Token perplexity over the dense model's, in the study."""
    variant, dense = (read_json(REPOSITORY / f"study/results/{n}.json") for n in (name, "dense"))
    return variant[f"token_perplexity/{text}"] / dense[f"token_perplexity/{text}"]


def metric() -> Figure:
    """Perplexity over dense at 0.8 in each metric, all else (single matrices, uniform ranks, two factors) equal."""
    names = {"none": "svd-80", "diagonal": "diagonal-uniform-80", "input": "svd-llm-80", "kfac": "kfac-uniform-80"}
    figure = Figure(figsize=(6, 2.1), layout="constrained")
    axes = figure.subplots()
    ratios = [perplexity_ratio(name) for name in names.values()]
    bars = axes.barh(list(names), ratios, color=[colormaps["Set2"](n) for n in range(len(names))])
    axes.bar_label(bars, [f"{r:.2f}" if r < 1000 else f"{r:.0e}" for r in ratios], padding=3, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(1, 1e8)
    axes.invert_yaxis()
    axes.set_xlabel("token perplexity, news, over the dense model's")
    axes.set_title("uniform ranks, single matrices, two factors, 0.8 kept", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def units() -> Figure:
    """Left, channels that each MLP keeps, a line per size; right, what that is worth against matrices and pairs."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = (90, 80, 70, 60, 50)
    for number, size in enumerate(sizes):
        blocks = allocation(f"kfac-{size}")["blocks"]
        shares = [block["channels"] / block["full_channels"] for block in blocks]
        left.step(
            range(len(shares)), shares, where="mid", color=colormaps["viridis"](number / 5), label=f"0.{size // 10}"
        )
    left.set(ylim=(0, 1.05), xlabel="layer", ylabel="channels kept by the MLP", title="kfac: block")
    left.legend(title="kept in all", fontsize=8, title_fontsize=8)
    rows = {
        "matrix": ("kfac-least-loss-pivot", (80, 60)),
        "group (pairs of layers)": ("kfac-pairs-pivot", (80,)),
        "block (MLPs lose channels)": ("kfac", sizes),
    }
    for label, (name, measured) in rows.items():
        ratios = [perplexity_ratio(f"{name}-{size}") for size in measured]
        right.plot([size / 100 for size in measured], ratios, "o-", label=label)
    right.set(xlabel="share of the linears' parameters kept", ylabel="perplexity over dense, news", ylim=(1, None))
    right.set_title("kfac, least loss, pivot")
    right.legend(fontsize=8)
    return figure


def allocation_rules() -> Figure:
    """Where three rules keep rank, from the same spectra under the same budget."""
    names = ("kfac-uniform-80", "kfac-effective-rank-80", "kfac-least-loss-80")
    titles = {name: f"{allocation(name)['allocation']}: x {perplexity_ratio(name):.2f}" for name in names}
    return rank_heat_map([{**allocation(name), "variant": title} for name, title in titles.items()])


def storage() -> Figure:
    """Parameters against rank of a square and of an MLP's matrix, and the rank that 0.8 of them buys."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    kinds = ("q_proj", "gate_proj")
    for axes, kind in zip(figure.subplots(1, 2), kinds, strict=True):
        for number, (storage, name) in enumerate({"factors": "svd-llm-80", "pivot": "svd-llm-pivot-80"}.items()):
            unit = next(unit for unit in allocation(name)["units"] if unit["kind"] == kind)
            rows, columns = unit["out_features"], unit["in_features"]
            rank = np.arange(unit["full_rank"] + 1)
            price = rank * (rows + columns - (rank if storage == "pivot" else 0)) / (rows * columns)
            color = colormaps["Set1"](number)
            axes.plot(rank, price, color=color, label=storage)
            axes.plot(unit["rank"], unit["price"] / (rows * columns), "o", color=color)
            axes.annotate(f"{unit['rank']}", (unit["rank"], 0.8), (6, -12), textcoords="offset points", color=color)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="rank", ylim=(0, 2), title=f"{kind}, {rows} x {columns}")
        _label_share(axes)
    return figure


def profile() -> Figure:
    """data/allocation/kfac-80.json by layer: what is kept of each rank, of the MLP's channels, of the parameters."""
    document = allocation("kfac-80", root="")
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    attention, mlp, share = figure.subplots(3, 1, sharex=True)
    table = matrices(document).eval("kept = rank / full_rank")
    for number, (kind, rows) in enumerate(table[table["kind"] != CHANNELS].groupby("kind", sort=False)):
        axes = mlp if rows["role"].iloc[0] in ("gate", "up", "down") else attention
        color = colormaps["tab10"](number)
        axes.plot(rows["layer"], rows["kept"], color=color, label=kind, linewidth=1)
        for dense, face in ((True, color), (False, "white")):
            points = rows[(rows["form"] == "dense") == dense]
            axes.scatter(points["layer"], points["kept"], s=22, color=[face], edgecolors=[color], zorder=3)
    channels = table.loc[table["kind"] == CHANNELS, "kept"]
    mlp.step(range(len(channels)), channels, where="mid", color="black", linestyle=":", label="channels")
    by_layer = table.groupby("layer")[["price", "size"]].sum().eval("price / size")
    share.bar(by_layer.index, by_layer, color="grey", width=0.8)
    share.axhline(document["kept_ratio"], color="black", linewidth=0.8, linestyle=":")
    for axes, label in ((attention, "rank / full rank"), (mlp, "rank / full rank"), (share, "parameters kept")):
        axes.set(ylim=(0, 1.08), ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (attention, mlp):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    share.set_xlabel("layer")
    attention.set_title(f"{document['variant']}: filled is dense, hollow is of that rank in pivot form", fontsize=9)
    return figure


def _label_share(axes: Axes) -> None:
    axes.set_ylabel("parameters / dense")
    axes.legend(fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


PICTURES = {
    "choice-metric": metric,
    "choice-units": units,
    "choice-allocation": allocation_rules,
    "choice-storage": storage,
    "allocation-kfac-80": profile,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / f"{name}.png").write_bytes(png(draw()))
