"""The documents of a model folder as objects, with the fields that an audit reads. Whatever does not fit is refused."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drank.project.files import FileError

Sha256 = str


class Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class UnitRow(Document):
    name: str
    members: tuple[str, ...] = Field(min_length=1)
    factors: str
    kind: str
    layer: int
    form: Literal["dense", "factors", "pivot"]
    rank: int
    full_rank: int
    out_features: int
    in_features: int
    price: int
    objective_share: float
    relative_loss: float
    effective_rank: float

    @property
    def price_of_form(self) -> int:
        """Parameters that a matrix of this form, rank and size takes (docs/method.md, section 4)."""
        if self.form == "dense":
            return self.out_features * self.in_features
        saved = self.rank if self.form == "pivot" else 0
        return self.rank * (self.out_features + self.in_features - saved)


class BlockRow(Document):
    name: str
    channels: int
    full_channels: int
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
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{path.name}: not in the folder") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the document"
        versioned = key.endswith("format_version")
        hint = "; another version of drank wrote it: audit it with that one, or build it again" if versioned else ""
        raise FileError(f"{path.name}: {key}: {first['msg']}{hint}") from None
