"""The table of variants and the page. Takes rows, allocations and spectra; knows no files."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from drank.project.tolerance import other_dtypes
from drank.views.pareto import HIGHEST_RATIO, nats_by_bytes, perplexity_by_size, perplexity_columns, reference
from drank.views.pictures import Allocation, Spectrum, budget, loss_heat_map, png, rank_heat_map, spectrum_curves

LEADING = ("variant", "preset", "size_ratio", "kept_ratio", "parameters", "bytes", "dtype")
IN_BYTES = ("bytes_ratio", "megabytes")  # sizes that only variants with a budget in bytes have
# The policy is a promise to the reader: a browser fetches nothing for this page, whatever is in it.
PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>drank: variants</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fcfcfa;max-width:1240px;margin:0 auto;padding:1.5em}
h1{font-size:1.6em;margin:0 0 .4em}h2{font-size:1.15em;margin:2.2em 0 .2em}p{max-width:60em;margin:.3em 0 .8em}
.table{overflow:auto;max-height:90vh;background:#fff;border:1px solid #e4e4de;border-radius:4px}
table{border-collapse:collapse;font-size:.88em;font-variant-numeric:tabular-nums;width:100%}
td{white-space:nowrap}th{vertical-align:bottom}
td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eee;background:#fff}
tbody tr:hover td{background:#f3f6fa}thead th{position:sticky;top:0;z-index:1;font-weight:600}
td:first-child,th:first-child{text-align:left;position:sticky;left:0}thead th:first-child{z-index:2}
td:nth-child(2),th:nth-child(2){text-align:left}
.picture{overflow-x:auto;background:#fff;border:1px solid #e4e4de;border-radius:4px;padding:.6em}
img{display:block;max-width:100%;margin:0 auto}
@media(max-width:760px){body{padding:.8em}img{max-width:none;height:auto}}
</style></head><body>
"""


@dataclass(frozen=True)
class Picture:
    """A figure, what it is, and one sentence on how to read it."""

    title: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """The bytes of the figure's file."""
        return png(self.figure)


def report(
    rows: Sequence[Mapping[str, Any]],
    allocations: Sequence[Allocation],
    summaries: Mapping[str, Mapping[str, Any]],
    singular_values: Mapping[str, Mapping[str, np.ndarray]],
    source: tuple[str, int] | None = None,
) -> tuple[str, dict[str, Picture], str]:
    """The table as CSV, pictures by file name, and the page, from documents by variant and spectra by key.

    Args:
        source: name and bytes of the file that the model came from, for the picture of precisions.
    """
    table = summary(rows)
    spectra = {key: Spectrum.of(described, singular_values[key]) for key, described in summaries.items()}
    shown = pictures(table, allocations, spectra, source)
    return table.to_csv(index=False, lineterminator="\n"), shown, page(rows, shown)


def summary(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per variant with the flat figures of its results, dense ones first, else in the order given.

    Columns: what the variant is, its sizes and the type it was measured in (LEADING), then every figure by name; empty
    where a variant lacks one. `bits` is 16 where results have none, if any have.
    """
    rounded = {"bits": 16} if any("bits" in row for row in rows) else {}
    flat = [
        rounded
        | {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        | {"dtype": row.get("protocol", {}).get("dtype")}
        for row in rows
    ]
    ordered = sorted(flat, key=lambda row: row["preset"] != "dense")
    found = {key for row in ordered for key in row}
    leading = [*LEADING[:3], *(key for key in IN_BYTES if key in found), *LEADING[3:]]
    return pd.DataFrame(ordered, columns=[*leading, *sorted(found.difference(leading))])


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The summary as text: sizes, perplexities and their ratios to dense, accuracies ± one standard error."""
    columns = {
        "variant": table["variant"],
        "preset": table["preset"],
        "kept": table["kept_ratio"].map("{:.3f}".format),
        "MB": (table["bytes"] / 1e6).map("{:.1f}".format),
    }
    if "bits" in table:
        columns["bits"] = table["bits"].map(str)
    for column in perplexity_columns(table):
        text, base = column.removeprefix("token_perplexity/"), reference(table, column)
        columns[f"perplexity, {text}"] = table[column].map(_figure)
        if base is not None:
            columns[f"×\u00a0{text}"] = (table[column] / base).map(_figure)
    for column in table.columns:
        metric, _, task = column.partition("/")
        if metric.startswith("acc") and not metric.endswith("_stderr"):
            errors = table.get(f"{metric}_stderr/{task}", pd.Series(float("nan"), table.index))  # a group has none
            columns[f"{metric}, {task.replace('_', ' ')}"] = table[column].map(_figure) + errors.map(
                lambda error: f" ± {error:.2f}" if error == error else ""
            )
    return pd.DataFrame(columns)


def pictures(
    table: pd.DataFrame,
    allocations: Sequence[Allocation],
    spectra: Mapping[str, Spectrum],
    source: tuple[str, int] | None = None,
) -> dict[str, Picture]:
    """Panels below the page's table, by file name, in its order. Dense variants have panels only if all are.

    Nats by bytes are drawn where a variant has less than 16 bits and a dense one is there to compare with.
    """
    compressed = [a for a in allocations if a["allocation"] != "dense"] or list(allocations)
    bases = {column: reference(table, column) for column in perplexity_columns(table)}
    beyond = pd.DataFrame({c: table[c] / base > HIGHEST_RATIO for c, base in bases.items() if base is not None})
    left_out = int(beyond.any(axis=1).sum())
    shown = {
        "perplexity": Picture(
            "Quality against size",
            "Lower and further left is better; no variant that is as small beats those on the grey band, the Pareto "
            "frontier."
            + (f" Left out, beyond {HIGHEST_RATIO} times the dense model's: {left_out} variants." if left_out else ""),
            perplexity_by_size(table),
        )
    }
    if "bits" in table and "dense" in set(table["preset"]):
        star = " The star is {}, the file that the dense model was read from, with the same function."
        shown["precision"] = Picture(
            "What a byte buys",
            "Nats per token lost, which is the logarithm of the ratio of token perplexities to the dense model's, "
            "against all bytes of the weights on disk, embeddings included. Lower and further left is better; the "
            "scale is linear up to 0.01. A line joins the variants of one precision that no other of that precision "
            f"beats.{star.format(source[0]) if source else ''}",
            nats_by_bytes(table, source),
        )
    shown["ranks"] = Picture(
        "Ranks",
        "A cell is a matrix, layers downwards: the darker, the more of its rank was taken away; “channels” is "
        "the share of its channels that an MLP kept, where it could lose any; its ranks are relative to the rest.",
        rank_heat_map(compressed),
    )
    shown["budget"] = Picture(
        "Where the budget went",
        "Left, a slot is as wide as that kind of matrix is in the dense model, and filled as far as its parameters "
        "were kept (in per cent; beside the name the ratio over all kinds); right, the same by layer.",
        budget(allocations),
    )
    shown["losses"] = Picture(
        "Where the loss is",
        "A cell is a matrix's share of all the error that its variant makes (white: none; “channels”: what their "
        "removal costs); with the metric kfac that error is a loss in nats, with the others energy, which weighs "
        "differently from matrix to matrix and is no forecast of perplexity.",
        loss_heat_map(compressed, spectra),
    )
    for key, spectrum in spectra.items():
        shown[f"spectra-{key}"] = Picture(
            f"Spectra: {key}",
            f"A line is a matrix, first layers dark: the share of its energy (metric {spectrum.metric}) that rank k "
            "would lose; the faster it falls, the cheaper the matrix is to truncate.",
            spectrum_curves(spectrum),
        )
    return shown


def page(rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Picture]) -> str:
    """One self-contained HTML page: what is compared, the table of variants, every picture with how to read it."""
    parts = [f"{PAGE_HEAD}<h1>drank: variants</h1>\n<p>{escape(lead(rows))}</p>"]
    parts.append(f'<div class="table">\n{readable(summary(rows)).to_html(index=False, border=0)}\n</div>')
    for picture in shown.values():
        title, source = escape(picture.title), f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        parts.append(f"<h2>{title}</h2>\n<p>{escape(picture.caption)}</p>")
        parts.append(f'<div class="picture"><img alt="{title}" src="{source}"></div>')
    return "\n".join([*parts, "</body></html>\n"])


def lead(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison in one paragraph: variants, what "kept" is a share of, and the protocol of the results."""
    compressed = [row["preset"] for row in rows if row["preset"] != "dense"]
    presets, targeted = len(set(compressed)), rows[0]["targeted_parameters"]
    protocols = dict.fromkeys(_protocol(row["protocol"]) for row in rows)
    types = other_dtypes(row["protocol"] for row in rows)
    return (
        f"{len(rows)} variants of one model: {len(rows) - len(compressed)} dense, {len(compressed)} compressed by "
        f"{presets} preset{'s' * (presets != 1)}. Kept is the share of the {targeted / 1e6:.4g} million "
        "parameters in the targeted linear layers that a variant stores; MB are the weights of the whole model on "
        f"disk, in millions of bytes. {' Other variants: '.join(protocols)}{f' {types}' if types else ''}"
    )


def _protocol(protocol: Mapping[str, Any]) -> str:
    shapes = protocol["test_windows"].items()
    windows = " and ".join(f"{n} windows of {length} tokens of {text}" for text, (n, length) in shapes)
    sentence = f"Perplexity is per token, over {windows}, in {protocol['dtype']}; × is its ratio to the dense model's."
    if tasks := [task.replace("_", " ") for task in protocol["tasks"] if not task.endswith("_rolling")]:
        limit = protocol["lm_eval_max_length"]
        sentence += f" Accuracies ({', '.join(tasks)}) are lm-eval's, at most {limit} tokens, ± one standard error."
    return sentence


def _figure(value: float) -> str:
    if value != value:
        return ""
    return f"{value:.2f}" if value < 10_000 else f"{value:.0e}"
