"""Table, pictures and page: by hand, against brute force and the allocation's objective; the page fetches nothing."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drank.method.allocation.rules import least_loss
from drank.method.allocation.units import Block, Menu, Unit
from drank.project.files import read_json
from drank.project.tolerance import DTYPE_TOLERANCE
from drank.steps.allocation import describe
from drank.views.matrices import matrices
from drank.views.page import Picture, lead, page, pictures, readable, report, summary
from drank.views.pareto import frontier, nats_by_bytes, perplexity_by_size
from drank.views.pictures import FEW, Spectrum, budget, loss_heat_map, losses, png, rank_heat_map, spectrum_curves

REPOSITORY = Path(__file__).parent.parent
COMMITTED = sorted(REPOSITORY.glob("data/allocation/*.json")) + sorted(
    REPOSITORY.glob("study/data/allocation/*-80.json")
)
PROTOCOL = {"dtype": "bfloat16", "lm_eval_max_length": 2048, "tasks": ["news_rolling", "last_word"],
            "test_windows": {"news": [32, 512]}}  # fmt: skip
SIZES = {"targeted_parameters": 106_168_320, "parameters": 99}
ROWS = [
    {"variant": "b", "preset": "x", "size_ratio": 0.5, "kept_ratio": 0.49, "bytes": 100_000_000,
     "token_perplexity/news": 20.0, "protocol": PROTOCOL, **SIZES},
    {"variant": "dense", "preset": "dense", "size_ratio": 1.0, "kept_ratio": 1.0, "bytes": 200_000_000,
     "token_perplexity/news": 10.0, "acc/last_word": 0.5, "acc_stderr/last_word": 0.123, "protocol": PROTOCOL, **SIZES},
]  # fmt: skip


def unit(name, layer, rank, form="factors", members=None, out_features=4, in_features=8, relative_loss=0.25):
    *_, kind = name.split(".")
    role = {"down_proj": "down", "up_proj": "up"}.get(kind, "query")
    return {"name": name, "members": members or [name], "factors": name, "layer": layer, "kind": kind, "role": role,
            "rank": rank, "full_rank": min(out_features, in_features), "form": form, "out_features": out_features,
            "in_features": in_features, "price": rank * (out_features + in_features) if form != "dense" else
            out_features * in_features, "relative_loss": relative_loss}  # fmt: skip


# Layers 0 and 1 share one basis of queries; the MLP of layer 1 has lost 2 of 8 channels.
ALLOCATION = {
    "variant": "b", "preset": "x", "spectrum": "s", "allocation": "least_loss", "kept_ratio": 0.49,
    "units": [
        unit("l.0.attn.q_proj", 0, 1, members=["l.0.attn.q_proj", "l.1.attn.q_proj"], out_features=8),
        unit("l.0.mlp.up_proj", 0, 4, "dense", relative_loss=0.0),
        unit("l.1.mlp.up_proj", 1, 3, out_features=6, in_features=4),
        unit("l.1.mlp.down_proj", 1, 4, "dense", out_features=4, in_features=6, relative_loss=0.5),
    ],
    "blocks": [{"name": "l.1.mlp", "channels": 6, "full_channels": 8, "loss": 3.0}],
}  # fmt: skip
SPECTRUM = Spectrum(
    metric="kfac",
    energies={
        "l.0.attn.q_proj": np.array([6.0, 2.0]),
        "l.0.mlp.up_proj": np.array([1.0]),
        "l.1.mlp.up_proj": np.array([4.0, 4.0]),
        "l.1.mlp.down_proj": np.array([3.0]),
    },
    matrices={"l.0.attn.q_proj": ("q_proj", 0), "l.1.mlp.up_proj": ("up_proj", 1)},
)


def test_the_table_has_dense_first_sizes_first_no_nested_values_and_as_text_ratios_and_standard_errors():
    table = summary(ROWS)
    sizes = ["variant", "preset", "size_ratio", "kept_ratio", "parameters", "bytes", "dtype"]
    figures = ["acc/last_word", "acc_stderr/last_word", "targeted_parameters", "token_perplexity/news"]
    assert list(table.columns) == sizes + figures
    assert np.isnan(table["acc/last_word"].iloc[1])
    assert list(table["dtype"]) == ["bfloat16", "bfloat16"]
    assert readable(table).to_dict("list") == {
        "variant": ["dense", "b"],
        "preset": ["dense", "x"],
        "kept": ["1.000", "0.490"],
        "MB": ["200.0", "100.0"],
        "perplexity, news": ["10.00", "20.00"],
        "×\u00a0news": ["1.00", "2.00"],
        "acc, last word": ["0.50 ± 0.12", ""],
    }
    without_dense = readable(summary([ROWS[0] | {"token_perplexity/news": 2.34e7}]))
    assert list(without_dense.columns) == ["variant", "preset", "kept", "MB", "perplexity, news"]
    assert list(without_dense["perplexity, news"]) == ["2e+07"]


SMALL = [0.0, 1.0, 2.0, 3.0, 4.0]  # few, so that ties are common


def best(points):
    return frontier(*pd.DataFrame(points, columns=["size", "value"], dtype=float).to_dict("series").values()).tolist()


@given(st.lists(st.tuples(st.sampled_from(SMALL), st.sampled_from(SMALL)), max_size=12))
def test_the_frontier_is_what_nothing_beats(points):
    def beaten(p):
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert best([(1, np.nan), (2, 7)]) == [1]
    found = best(points)
    assert [points[i] for i in found] == sorted({p for p in points if not beaten(p)})
    assert all(points.index(points[i]) == i for i in found)


def test_perplexity_is_drawn_over_the_dense_one_and_few_variants_are_named():
    axes = perplexity_by_size(summary(ROWS)).axes[0]
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines == {"Pareto frontier": [2.0, 1.0], "dense": [1.0], "x": [2.0]}
    assert [text.get_text() for text in axes.texts] == ["dense", "b"]
    alone = perplexity_by_size(summary(ROWS[:1])).axes[0]
    assert (alone.lines[1].get_ydata().tolist(), alone.get_ylabel()) == ([20.0], "token perplexity")


ROUNDED = [
    *ROWS,
    ROWS[1] | {"variant": "int4", "preset": "int4", "bits": 4, "bytes": 90_000_000, "token_perplexity/news": 15.0},
    ROWS[1] | {"variant": "gptq-4", "preset": "gptq", "bits": 4, "bytes": 90_000_000, "token_perplexity/news": 11.0},
    ROWS[0] | {"variant": "b-8", "bits": 8, "bytes": 70_000_000, "token_perplexity/news": 21.0},
    ROWS[0] | {"variant": "m", "preset": "m", "bits": "mixed", "bytes": 60_000_000, "token_perplexity/news": 12.0},
]


def test_with_precisions_below_16_nats_are_drawn_against_all_bytes():
    table = summary(ROUNDED)
    assert list(table["bits"]) == [16, 16, 4, 4, 8, "mixed"]
    axes = nats_by_bytes(table, ("m.gguf", 80_000_000)).axes[0]
    points = {
        line.get_label(): list(zip(line.get_xdata(), np.exp(line.get_ydata()).round(9), strict=True))
        for line in axes.lines
        if line.get_linestyle() == "None"
    }
    assert points == {
        "m.gguf": [(80.0, 1.0)],
        "dense, 16 bits": [(200.0, 1.0)],
        "low rank, 16 bits": [(100.0, 2.0)],
        "dense, rounded": [(90.0, 1.5), (90.0, 1.1)],
        "low rank, 8 bits": [(70.0, 2.1)],
        "mixed": [(60.0, 1.2)],
    }
    assert [text.get_text() for text in axes.texts] == ["dense", "b", "int4", "gptq-4", "b-8", "m"]
    shown = pictures(table, [ALLOCATION], {"s": SPECTRUM}, ("m.gguf", 80_000_000))
    assert list(shown)[:2] == ["perplexity", "precision"]
    assert "The star is m.gguf" in shown["precision"].caption
    assert readable(table)["bits"].tolist() == ["16", "16", "4", "4", "8", "mixed"]
    for rows in (ROWS, [row for row in ROUNDED if row["preset"] != "dense"]):  # no bits; no dense one
        assert "precision" not in pictures(summary(rows), [ALLOCATION], {"s": SPECTRUM})


def test_many_variants_have_a_legend_and_far_ones_are_left_out():
    rows = ROWS + [ROWS[0] | {"variant": f"v{i}", "token_perplexity/news": 20.0 + 40 * i} for i in range(FEW)]
    shown = pictures(summary(rows), [ALLOCATION], {"s": SPECTRUM})["perplexity"]
    axes, legend = shown.figure.axes[0], shown.figure.legends[0]
    assert (axes.texts[:], axes.get_ylim()[1]) == ([], 32)
    assert [text.get_text() for text in legend.get_texts()] == ["Pareto frontier", "dense", "x"]
    assert shown.caption.endswith("beyond 32 times the dense model's: 4 variants.")  # i = 8, 9, 10, 11


def image(axes):
    return np.ma.filled(axes.images[0].get_array().astype(float), np.nan).tolist()


def test_the_heat_map_draws_shares_of_the_full_rank_and_channels_kept():
    figure = rank_heat_map([ALLOCATION, ALLOCATION | {"variant": "c", "blocks": []}])
    nan = pytest.approx(np.nan, nan_ok=True)
    with_block, without = figure.axes[:2]
    assert image(with_block) == [[0.125, 1.0, nan, nan], [0.125, 0.75, 1.0, 0.75]]
    assert image(without) == [[0.125, 1.0, nan, nan], [0.125, 0.75, 1.0, nan]]
    assert [label.get_text() for label in with_block.get_xticklabels()] == ["q", "up", "down", "channels"]
    for ticks in (with_block.get_yticks(), budget([ALLOCATION]).axes[1].get_xticks()):
        assert {0, 1} <= set(ticks)
        assert all(tick == round(tick) for tick in ticks), "a model of two layers has no layer 0.5"


def test_parameters_of_the_dense_model_are_those_that_the_allocation_counted():
    assert matrices(ALLOCATION)["size"].tolist() == [32, 32, 32, 32, 32, 0]
    for allocation in map(read_json, COMMITTED):
        assert matrices(allocation)["size"].sum() == allocation["targeted_parameters"]


def test_the_budget_draws_what_was_kept_by_kind_and_by_layer():
    left, right, _ = budget([ALLOCATION]).axes
    slots, filled = np.array([bar.get_width() for bar in left.patches]).reshape(2, 3)
    assert slots.tolist() == [64 / 160, 64 / 160, 32 / 160]
    # queries: 1 (8 + 8) of 64; up: 32 dense and 3 (6 + 4) = 30; down: dense at the 4 x 6 that are left
    assert filled.tolist() == pytest.approx([16 / 160, 62 / 160, 24 / 160])
    assert [text.get_text() for text in left.texts] == ["25", "97", "75"]
    assert image(right) == [pytest.approx([(8 + 32) / (32 + 32), (8 + 30 + 24) / (32 + 32 + 32)])]


@given(st.integers(0, 10_000), st.floats(0.3, 0.95), st.sampled_from(["factors", "pivot"]))
def test_losses_sum_to_the_objective_of_the_allocation(seed, size_ratio, storage):
    draw = np.random.default_rng(seed)

    def matrix(name, role, layer, shape, base_loss=0.0):
        energies = np.sort(draw.exponential(size=min(shape)))[::-1].copy()
        return Unit(name, role, role, layer, *shape, energies=energies, effective_rank=1.0, base_loss=base_loss)

    units = []
    for layer in range(2):
        units.append(matrix(f"l.{layer}.attn.q", "query", layer, (12, 12)))
        ups = [matrix(f"l.{layer}.mlp.up", "up", layer, (n, 12)) for n in (20, 15, 10)]
        downs = [matrix(f"l.{layer}.mlp.down", "down", layer, (12, n), 0.4 * (20 - n)) for n in (20, 15, 10)]
        units.append(Block(f"l.{layer}.mlp", tuple(zip(ups, downs, strict=True))))
    allocation = least_loss(units, size_ratio, Menu(storage))
    chosen = allocation.matrices(units)
    rows = [
        {"name": u.name, "out_features": u.out_features, "in_features": u.in_features, "members": [u.name],
         "factors": u.name}
        for u in chosen
    ]  # fmt: skip
    described = {"variant": "v"} | describe(units, allocation, {"units": rows, "blocks": []})
    assert losses(described, Spectrum("kfac", {u.name: u.energies for u in chosen}, {})).sum().sum() == pytest.approx(
        allocation.objective
    )
    assert matrices(described)["size"].sum() == allocation.targeted_parameters


def test_the_loss_picture_has_shares_in_the_unit_of_the_metric_and_white_where_nothing_is_lost():
    axes = loss_heat_map([ALLOCATION], {"s": SPECTRUM}).axes[0]
    nan = pytest.approx(np.nan, nan_ok=True)
    # queries: a quarter of 8, in equal parts; down: half of 3 + 3 is its base loss, all of it the channels' doing
    assert image(axes) == [[1 / 7, nan, nan, nan], [1 / 7, 2 / 7, nan, 3 / 7]]
    assert axes.get_title() == "b\nkfac: 3.5 nats a token"
    plain = Spectrum("input", SPECTRUM.energies, SPECTRUM.matrices)
    without = ALLOCATION | {"blocks": [], "units": ALLOCATION["units"][:3]}
    assert loss_heat_map([without], {"s": plain}).axes[0].get_title() == "b\ninput: 24 % of energy"  # 4 of 17


def test_spectra_draw_the_energy_beyond_each_rank():
    spectrum = Spectrum("input", {"u": np.array([9.0, 1.0, 0.0]), "v": np.zeros(2)}, {"u": ("q", 0), "v": ("q", 1)})
    lines = spectrum_curves(spectrum).axes[0].lines
    assert lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.1, 1e-8, 1e-8])
    assert lines[1].get_ydata().tolist() == pytest.approx([1e-8] * 3)


def test_dense_variants_alone_make_a_page():
    units = [unit("l.0.q_proj", 0, 4, "dense", relative_loss=0.0)]
    described = {"metric": "none", "units": [{"factors": "f", "kind": "q_proj", "layer": 0}], "blocks": []}
    dense = ALLOCATION | {"allocation": "dense", "blocks": [], "units": [units[0] | {"factors": "f"}]}
    table, shown, html = report(ROWS[1:], [dense], {"s": described}, {"s": {"f": np.zeros(4)}})
    assert table.startswith("variant,preset,size_ratio,kept_ratio,parameters,bytes,dtype,")
    assert list(shown) == ["perplexity", "ranks", "budget", "losses", "spectra-s"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in shown.values())
    assert html.count("<img ") == 5


def test_the_lead_says_what_is_compared_and_by_which_protocol():
    perplexity = (
        "Perplexity is per token, over 32 windows of 512 tokens of news, in {}; × is its ratio to the dense model's."
    )
    assert lead(ROWS) == (
        "2 variants of one model: 1 dense, 1 compressed by 1 preset. Kept is the share of the 106.2 million parameters "
        "in the targeted linear layers that a variant stores; MB are the weights of the whole model on disk, in "
        f"millions of bytes. {perplexity.format('bfloat16')} Accuracies (last word) are lm-eval's, at most 2048 "
        "tokens, ± one standard error."
    )
    other = ROWS[1] | {"protocol": PROTOCOL | {"dtype": "float32", "tasks": []}}
    assert lead([ROWS[0], other]).endswith(
        f" Other variants: {perplexity.format('float32')} Measured in different types, bfloat16 and float32: a "
        f"difference of less than {DTYPE_TOLERANCE:.1%} in token perplexity may come from the type alone."
    )


def test_the_same_figure_is_the_same_bytes_and_the_page_fetches_nothing():
    assert png(rank_heat_map([ALLOCATION])) == png(rank_heat_map([ALLOCATION]))
    name = "<script src='https://example.org/x.js'></script>" + "x" * 60
    protocol = PROTOCOL | {"test_windows": {"<i>": [1, 2]}}
    rows = [*ROWS, ROWS[0] | {"variant": name, "token_perplexity/<i>": 3.0, "protocol": protocol}]
    shown = {"ranks": Picture("<Ranks>", "read & see", rank_heat_map([ALLOCATION]))}
    html = page(rows, shown)
    assert html == page(rows, shown)
    assert "<td>dense</td>" in html
    assert "<h2>&lt;Ranks&gt;</h2>\n<p>read &amp; see</p>" in html
    assert "x" * 60 in html
    assert "2 tokens of &lt;i&gt;" in html
    assert not re.search(r"<(script|link|iframe|i)\b|href|url\(|@import", html)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'<img[^>]* src="([^"]*)"', html))
    assert "default-src 'none'" in html
