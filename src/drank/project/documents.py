"""The JSON documents of a project and of a model folder as objects. Unfit ones are refused, more keys passed over.

The one description of them in code; docs/data.md has it in words.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError

from drank.method.allocation.units import PIVOT_ROUNDING, PRICES
from drank.method.precisions import FULL, bytes_of
from drank.model import format
from drank.project.files import FileError, weights_sha256

Sha256 = str
Count = Annotated[int, Field(ge=0, lt=2**53)]  # JSON's numbers are exact up to here


class Document(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class UnitRow(Document):
    name: str
    members: tuple[str, ...] = Field(min_length=1)
    kind: str
    role: str | None
    layer: Count
    form: Literal["dense", *PRICES]  # type: ignore[valid-type]
    rank: Count
    full_rank: Annotated[Count, Field(ge=1)]
    out_features: Count
    in_features: Count
    price: Count
    objective_share: float
    relative_loss: float
    effective_rank: float
    bits: Count = FULL
    bytes: Count | None = None

    @property
    def is_rounded(self) -> bool:
        return self.bits < FULL

    def bytes_of_form(self, group: int | None) -> int:
        """Bytes that a matrix of this form, rank, size and bits takes; ``group`` is that of its scales."""
        n_out, n_in = self.out_features, self.in_features
        return int(bytes_of(self.form, n_out, n_in, self.rank, self.bits, group or n_in))

    @property
    def price_of_form(self) -> int:
        """Parameters of a matrix of this form, rank and size (docs/method.md, section 4)."""
        n_out, n_in = self.out_features, self.in_features
        return n_out * n_in if self.form == "dense" else int(PRICES[self.form](n_out, n_in, self.rank))


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
    size_ratio: float | None = None
    bytes_ratio: float | None = None
    megabytes: float | None = None
    kept_ratio: float
    targeted_parameters: Annotated[Count, Field(ge=1)]
    budget: Count
    price: Count
    slack: int
    objective: Objective
    units: tuple[UnitRow, ...]
    blocks: tuple[BlockRow, ...]
    inputs: dict[str, Sha256]
    group_size: Annotated[Count, Field(ge=1)] | None = None
    embedding_bits: Count | None = None
    bytes: Count | None = None
    bytes_budget: Count | None = None


class SpectrumRow(Document):
    name: str
    factors: str
    out_features: Count
    in_features: Count
    base_loss: float
    rounding: dict[str, float] = {}

    def rounded(self, unit: UnitRow) -> float:
        """Loss of rounding the unit's form to its bits; 0 where the spectrum does not know it."""
        whole = 0.0 if unit.bits == FULL else self.rounding.get(str(unit.bits), 0.0)
        return whole if unit.form == "dense" else whole * PIVOT_ROUNDING


class Cut(Document):
    matrices: tuple[SpectrumRow, ...]


class SpectrumBlock(Document):
    cuts: tuple[Cut, ...]


class SpectrumSummary(Document):
    """The part of a spectrum's summary.json on matrices that a rank may be chosen for."""

    units: tuple[SpectrumRow, ...]
    blocks: tuple[SpectrumBlock, ...]

    @property
    def matrices(self) -> list[SpectrumRow]:
        """All of them, those that a removed channel has left smaller too."""
        return [*self.units, *(row for block in self.blocks for cut in block.cuts for row in cut.matrices)]


class Results(Document):
    """The content of results/<variant>.json: figures by name, and how they were measured."""

    model_config = ConfigDict(extra="allow")
    protocol: dict[str, Any] = {}

    @property
    def figures(self) -> dict[str, int | float]:
        values = (self.model_extra or {}).items()
        return {name: value for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)}


class Provenance(Document):
    variant: str
    allocation_sha256: Sha256
    base_model_sha256: Sha256
    healed_from_sha256: Sha256 | None = None


class Quantization(format.Quantization):
    """The loader takes any provenance, an audit this."""

    provenance: Provenance  # type: ignore[assignment]


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


def _at(*path: str, **options: Any) -> Any:
    """A field that lies deeper in the document."""
    return Field(validation_alias=AliasPath(*path), **options)


class StatementDocument(Document):
    """An in-toto statement with SLSA provenance, as :func:`drank.steps.release.statement` writes it."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    subject: tuple[Resource, ...]
    parameters: dict[str, dict[str, Any]] = _at("predicate", "buildDefinition", "externalParameters")
    computed_in: dict[str, str] = _at("predicate", "buildDefinition", "internalParameters", "computed_in", default={})
    materials: tuple[Resource, ...] = _at("predicate", "buildDefinition", "resolvedDependencies")
    versions: dict[str, str] = _at("predicate", "runDetails", "builder", "version")
    byproducts: tuple[Resource, ...] = _at("predicate", "runDetails", "byproducts", min_length=1, max_length=1)

    @property
    def variant(self) -> str:
        """The variant's name, empty where the statement has none."""
        return str(self.parameters.get("variant", {}).get("name", ""))

    @property
    def results(self) -> dict[str, Any]:
        return self.byproducts[0].annotations

    @property
    def digests(self) -> dict[str, Sha256]:
        """SHA-256 of what went in, by name; sources of which none was asked are absent."""
        return {material.name: material.digest.sha256 for material in self.materials if material.digest}

    @property
    def base_model_sha256(self) -> Sha256:
        """One hash for the base model's weights, as :func:`drank.project.files.weights_sha256`."""
        base = "data/raw/model/"
        return weights_sha256({k.removeprefix(base): d for k, d in self.digests.items() if k.startswith(base)})


class ExportDocument(Document):
    """export.json: the folder that a model was exported from, how, and by which versions.

    ``sha256sums`` is the SHA-256 of the released folder's SHA256SUMS, ``model_md5`` the hash that DVC has for it; both
    are absent where the folder was not a released one.
    """

    format_version: Literal[1]
    form: str
    options: dict[str, Any]
    versions: dict[str, str]
    variant: str
    allocation_sha256: Sha256
    base_model_sha256: Sha256
    sha256sums: Sha256 | None = None
    model_md5: str | None = None


class VersionError(FileError):
    """A document of another version of drank: it may be whole, but cannot be read here."""


Read = TypeVar("Read", bound=Document)


def read_document(path: Path, kind: type[Read]) -> Read:
    """Read a JSON document as an object of this kind; a FileError if it is missing, no JSON, or lacks a field."""
    try:
        return parse_document(path.read_bytes(), path.name, kind)
    except FileNotFoundError:
        raise FileError(f"{path.name}: not in the folder") from None


def parse_document(content: bytes | str, where: str, kind: type[Read]) -> Read:
    """The same of bytes or text; ``where`` names them in errors."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        told = f"{where}: {key}: {first['msg']}"
        if key.endswith("format_version") and isinstance(first["input"], int):
            raise VersionError(f"{told}; another version of drank wrote it: audit it with that one") from None
        raise FileError(told) from None
