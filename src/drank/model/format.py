"""``quantization_config`` of a compressed folder's config.json, typed once for the loader and the audit::

    {"quant_method": "drank", "format_version": 2, "modules": {dotted name: spec}, "provenance": {...}}
    spec: {"form": a key of layers.FORMS | "dense" | "embedding", "rank": r, "out_features": n, "in_features": n,
           "basis": name, "first": n, "kept": n, "in_order": true, "bits": n, "group": n}

`out_features` and `in_features` are the sizes in the compressed model, at most those of the architecture: removed MLP
channels make them smaller. `rank` is absent for dense. `basis` names the module whose basis this one shares, its
owner: of the same form, rank and in_features, and with a basis of its own (it may name itself). layers.py says which
tensors a form has; a shared basis is stored once, under its owner. Keys that this version does not know, of the whole
or of a spec, are kept when the model is saved again.

`first` and `kept` go with `basis` in form `pivot`, where the owner does name itself: rows first ... first + kept - 1
of the basis are the module's own output features, and each row of a basis is so of exactly one module. `kept` may be
0. A `pivot` module without `basis` has its own rows, all of them kept, and neither key; with `in_order` its output
features are numbered as it computes them, and it has no `places`.

With `bits`, 2 to 8, each matrix of the module is rounded, dense ones too, and stored as packing.py says; `group` is the
number of neighbours in a row that share a scale and a zero point. Form `embedding` is the input embedding, that of
`out_features` tokens in `in_features` numbers of 8 bits, with one scale per token and no `group`, or an output head of
that shape; a head that is tied to the embedding has no spec and follows.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 2
SCALES, ZEROS = "_scales", "_zeros"  # behind the name of a rounded matrix, the names of what goes with its integers

Size = Annotated[int, Field(ge=1)]


class FormatError(ValueError):
    """A quantization_config that is malformed, too new, or unfit for the model; the message names it."""


class Spec(BaseModel):
    """One module. Keys of a form that has others are attributes too."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    form: str
    out_features: Size
    in_features: Size
    rank: Size | None = None
    basis: str | None = None
    first: Annotated[int, Field(ge=0)] | None = None
    kept: Annotated[int, Field(ge=0)] | None = None
    in_order: bool = False
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    group: Size | None = None


class Quantization(BaseModel):
    """The section as a whole."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    quant_method: Literal["drank"] = "drank"
    format_version: Literal[2]
    modules: dict[Annotated[str, Field(min_length=1)], Spec]
    provenance: dict[str, Any]


def parse(section: Mapping[str, Any]) -> Quantization:
    """The section as an object.

    Raises:
        FormatError: a value that its key does not take.
    """
    try:
        return Quantization.model_validate(dict(section))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "missing" if first["type"] == "missing" else reprlib.repr(first["input"])
        raise FormatError(f"quantization_config.{key} is {given}: {first['msg']}") from None
