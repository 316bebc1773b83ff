"""The JSON documents of a project and of a model folder as objects. Unfit ones are refused, more keys passed over.

The one description of them in code; docs/data.md has it in words.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drank.method.allocation.units import PRICES
from drank.project.files import FileError
from drank.project.params import read_params
from drank.project.resolved import resolved

Sha256 = str
Count = Annotated[int, Field(ge=0, lt=2**53)]  # JSON's numbers are exact up to here


class Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class UnitRow(Document):
    name: str
    members: tuple[str, ...] = Field(min_length=1)
    factors: str
    kind: str
    role: str | None
    layer: Count
    form: Literal["dense", "factors", "pivot"]
    rank: Count
    full_rank: Annotated[Count, Field(ge=1)]
    out_features: Count
    in_features: Count
    price: Count
    objective_share: float
    relative_loss: float
    effective_rank: float

    @property
    def price_of_form(self) -> int:
        """Parameters that a matrix of this form, rank and size takes (docs/method.md, section 4)."""
        if self.form == "dense":
            return self.out_features * self.in_features
        return int(PRICES[self.form](self.out_features, self.in_features, self.rank))


class BlockRow(Document):
    name: str
    channels: Count
    full_channels: Annotated[Count, Field(ge=1)]
    loss: float


class Objective(Document):
    value: float
    bound: float
    gap: float


class AllocationDocument(Document):
    format_version: Literal[1]
    variant: str
    preset: str
    spectrum: str
    allocation: str
    storage: str
    size_ratio: float
    kept_ratio: float
    targeted_parameters: int
    budget: int
    price: int
    slack: int
    objective: Objective
    units: tuple[UnitRow, ...]
    blocks: tuple[BlockRow, ...]
    inputs: dict[str, Sha256]


class Results(Document):
    """What results/<variant>.json has: figures by name, and how they were measured."""

    model_config = ConfigDict(extra="allow")
    protocol: dict[str, Any] = {}

    @property
    def figures(self) -> dict[str, int | float]:
        values = (self.model_extra or {}).items()
        return {name: value for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)}


class ModuleSpec(Document):
    form: str
    out_features: int
    in_features: int
    rank: int | None = None
    kept: int = 0
    in_order: bool = False


class Provenance(Document):
    variant: str
    allocation_sha256: Sha256
    base_model_sha256: Sha256
    healed_from_sha256: Sha256 | None = None
    healed_in: str | None = None


class Quantization(Document):
    quant_method: Literal["drank"]
    format_version: Literal[2]
    modules: dict[str, ModuleSpec]
    provenance: Provenance


class Config(Document):
    """config.json; without the section where nothing is compressed."""

    quantization_config: Quantization | None = None


class Digest(Document):
    sha256: Sha256


class Resource(Document):
    name: str
    uri: str | None = None
    digest: Digest | None = None
    annotations: dict[str, Any] = {}


class Builder(Document):
    id: str
    version: dict[str, str]


class BuildDefinition(Document):
    build_type: str = Field(alias="buildType")
    parameters: dict[str, dict[str, Any]] = Field(alias="externalParameters")
    internal: dict[str, Any] = Field(alias="internalParameters", default={})
    dependencies: tuple[Resource, ...] = Field(alias="resolvedDependencies")


class RunDetails(Document):
    builder: Builder
    byproducts: tuple[Resource, ...] = Field(min_length=1, max_length=1)


class Predicate(Document):
    build: BuildDefinition = Field(alias="buildDefinition")
    run: RunDetails = Field(alias="runDetails")


class StatementDocument(Document):
    """An in-toto statement with SLSA provenance, as :func:`drank.steps.release.statement` writes it."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    subject: tuple[Resource, ...]
    predicate: Predicate

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        return self.predicate.build.parameters

    @property
    def variant(self) -> str:
        """The variant's name, empty where the statement has none."""
        return str(self.parameters.get("variant", {}).get("name", ""))

    @property
    def computed_in(self) -> dict[str, str]:
        """The type of each kind of pass, by its name; a statement of an older version has that of evaluation."""
        protocol = self.results.get("protocol")
        measured = {"evaluation": protocol["dtype"]} if isinstance(protocol, dict) and "dtype" in protocol else {}
        found = self.predicate.build.internal.get("computed_in", measured)
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}

    @property
    def results(self) -> dict[str, Any]:
        return self.predicate.run.byproducts[0].annotations

    @property
    def digests(self) -> dict[str, Sha256]:
        """SHA-256 of what went in, by name; sources of which none was asked are absent."""
        return {d.name: d.digest.sha256 for d in self.predicate.build.dependencies if d.digest is not None}


Read = TypeVar("Read", bound=Document)


def read_document(path: Path, kind: type[Read]) -> Read:
    """Read a JSON document as an object of this kind.

    Raises:
        FileError: missing, not JSON, or without a field that it must have.
    """
    try:
        return parse_document(path.read_bytes(), path.name, kind)
    except FileNotFoundError:
        raise FileError(f"{path.name}: not in the folder") from None


def parse_document(content: bytes | str, where: str, kind: type[Read]) -> Read:
    """The document in these bytes; ``where`` names it in errors.

    Raises:
        FileError: not JSON, or without a field that it must have.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the document"
        versioned = key.endswith("format_version")
        hint = "; another version of drank wrote it: audit it with that one, or build it again" if versioned else ""
        raise FileError(f"{where}: {key}: {first['msg']}{hint}") from None


def parameters_of(content: bytes, variant: str) -> dict[str, Any]:
    """What a variant comes from, by the params.yaml in these bytes, such as those of a commit.

    Raises:
        ParamsError: not a params.yaml of this version of drank, or one without this variant.
    """
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "params.yaml"
        path.write_bytes(content)
        return resolved(read_params(path), variant)
