"""An allocation as a table, which pictures and differences are made of. Takes documents; knows no files."""

from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd

Allocation = Mapping[str, Any]  # what data/allocation/<variant>.json holds (docs/data.md)
CHANNELS = "channels"


def matrices(allocation: Allocation) -> pd.DataFrame:
    """A row per matrix of the model, and one of kind and form "channels" per MLP that could lose any; by name.

    Layers that share a basis have a row each, with equal parts of its ``price`` and ``size`` (parameters stored, and in
    the dense model). ``rank`` and ``full_rank`` of an MLP are its channels; ``base_loss`` is the loss by removed ones,
    in its own row and in that of its last matrix. The other columns are those of the document.
    """
    units = pd.DataFrame(allocation["units"]).rename(columns={"name": "unit"})
    mlp = units["unit"].str.rpartition(".")[0].where(units["role"].isin(["gate", "up", "gate_up", "down"]))
    blocks = pd.DataFrame(allocation.get("blocks", ()), columns=["name", "channels", "full_channels", "loss"])
    blocks = blocks[blocks["name"].isin(mlp)]
    channels, full, loss = (mlp.map(blocks.set_index("name")[key]) for key in ("channels", "full_channels", "loss"))
    # One of the two sides is the number of channels, so that the quotient is a whole number.
    units["size"] = units["out_features"] * units["in_features"] * full.fillna(1) / channels.fillna(1)
    units["base_loss"] = loss.where(units["role"] == "down").fillna(0.0)
    units["sharing"] = units["members"].str.len()
    rows = units.explode("members", ignore_index=True).rename(columns={"members": "name"})
    rows["layer"] += rows.groupby("unit").cumcount()  # consecutive ones share a basis
    rows[["price", "size"]] = rows[["price", "size"]].div(rows["sharing"], axis=0)
    if len(blocks):
        blocks = blocks.set_axis(["name", "rank", "full_rank", "base_loss"], axis=1)
        blocks["layer"] = blocks["name"].map(dict(zip(mlp, units["layer"], strict=True)))
        rows = pd.concat([rows, blocks.assign(kind=CHANNELS, form=CHANNELS, price=0.0, size=0.0)])
    return rows.set_index("name")


def by_layer(rows: pd.DataFrame, column: str, aggregate: Literal["mean", "sum"] = "sum") -> pd.DataFrame:
    """A column by layer (down) and kind (across), kinds in the order of their first rows."""
    table = rows.pivot_table(index="layer", columns="kind", values=column, aggfunc=aggregate)
    return table[rows["kind"].unique()]
