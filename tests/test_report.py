"""The table and the pictures: order and columns by hand, values drawn, same bytes, a page with nothing to fetch."""

import re

import numpy as np
import pytest

from drank.report import page, perplexity_by_size, png, rank_heat_map, spectra, summary

ROWS = [
    {"variant": "b", "preset": "x", "size_ratio": 0.5, "kept_ratio": 0.49, "parameters": 50, "bytes": 100,
     "token_perplexity/news": 20.0, "protocol": {"dtype": "bfloat16"}},
    {"variant": "dense", "preset": "dense", "size_ratio": 1.0, "kept_ratio": 1.0, "parameters": 99, "bytes": 200,
     "token_perplexity/news": 10.0, "acc/last_word": 0.5, "protocol": {"dtype": "bfloat16"}},
]  # fmt: skip
ALLOCATION = {
    "variant": "b",
    "kept_ratio": 0.49,
    "units": [
        {"members": ["one"], "layer": layer, "kind": kind, "rank": rank, "full_rank": 4}
        for layer, kind, rank in [(0, "q_proj", 1), (0, "o_proj", 4), (1, "q_proj", 2), (1, "o_proj", 3)]
    ],
}


def test_the_table_has_dense_first_sizes_first_and_no_nested_values():
    table = summary(ROWS)
    assert list(table["variant"]) == ["dense", "b"]
    sizes = ["variant", "preset", "size_ratio", "kept_ratio", "parameters", "bytes"]
    assert list(table.columns) == [*sizes, "acc/last_word", "token_perplexity/news"]
    assert np.isnan(table["acc/last_word"].iloc[1])


def test_the_heat_map_draws_shares_of_the_full_rank():
    image = rank_heat_map([ALLOCATION]).axes[0].images[0]
    assert image.get_array().tolist() == [[0.25, 1.0], [0.5, 0.75]]


def test_perplexity_is_drawn_over_the_dense_one():
    lines = {line.get_label(): line.get_ydata().tolist() for line in perplexity_by_size(summary(ROWS)).axes[0].lines}
    assert lines == {"dense": [1.0], "x": [2.0]}


def test_spectra_draw_the_energy_beyond_each_rank():
    figure = spectra({"u": np.array([3.0, 1.0]), "v": np.zeros(2)}, {"u": "q_proj", "v": "q_proj"}, {"u": 0, "v": 1})
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.25, 1e-8])


def test_the_same_figure_is_the_same_bytes_and_the_page_fetches_nothing():
    assert png(rank_heat_map([ALLOCATION])) == png(rank_heat_map([ALLOCATION]))
    html = page(summary(ROWS), {"ranks": png(rank_heat_map([ALLOCATION]))})
    assert "<td>dense</td>" in html
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', html))
    assert "href" not in html
