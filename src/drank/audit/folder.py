"""A model folder by itself: does it hold together? Needs nothing but the folder."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drank import __version__
from drank.audit.ledger import BrokenLinkError, Ledger, UncheckableError
from drank.model.format import SCALES, Spec
from drank.project.documents import (
    AllocationDocument,
    Config,
    Quantization,
    StatementDocument,
    UnitRow,
    read_document,
)
from drank.project.dvc import dvc_md5
from drank.project.files import FileError, file_sha256, read_json, weights_sha256
from drank.project.state import flat
from drank.steps.release import CARD, CHECKSUMS, STATEMENT, card, checksums

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Folder:
    """A model folder and what is read from it, each once."""

    path: Path

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file but the list of them."""
        files = sorted(file for file in self.path.rglob("*") if not file.is_dir())
        names = {file.relative_to(self.path).as_posix(): file for file in files}
        return {name: file_sha256(file) for name, file in names.items() if name != CHECKSUMS}

    @cached_property
    def md5(self) -> str:
        """The hash that DVC has for the folder."""
        return dvc_md5(self.path)

    @cached_property
    def statement(self) -> StatementDocument:
        return read_document(self.path / STATEMENT, StatementDocument)

    @cached_property
    def allocation(self) -> AllocationDocument:
        return read_document(self.path / "allocation.json", AllocationDocument)

    @cached_property
    def quantization(self) -> Quantization | None:
        """``quantization_config`` of config.json; None where nothing is compressed."""
        return read_document(self.path / "config.json", Config).quantization_config

    @cached_property
    def tensors(self) -> tuple[Shapes, int]:
        """Shapes of the stored tensors, and how many numbers they hold: floating-point ones that are no scales, and
        those stored as integers.

        Raises:
            FileError: a weight file is damaged.
        """
        from drank.model.forms import numbers_in_integers

        n_numbers = numbers_in_integers(self.quantization.modules) if self.quantization else 0
        scales = {name + SCALES for name in self._stored}
        for name, (shape, kind) in self._stored.items():
            n_numbers += math.prod(shape) if "F" in kind and name not in scales else 0
        return {name: shape for name, (shape, _) in self._stored.items()}, n_numbers

    @property
    def types(self) -> dict[str, str]:
        """The type of every stored tensor, by safetensors' name for it."""
        return {name: kind for name, (_, kind) in self._stored.items()}

    @cached_property
    def _stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        from safetensors import SafetensorError, safe_open

        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118  not a mapping
                        part = file.get_slice(name)
                        found[name] = tuple(part.get_shape()), part.get_dtype()
            except (SafetensorError, RuntimeError) as error:  # torch's, of a file that a stage is writing
                raise FileError(f"{path.name}: damaged, not safetensors: {error}; or is `dvc repro` at work?") from None
        return found


def check_folder(ledger: Ledger, folder: Folder) -> None:
    """Every link that the folder alone can show."""
    ledger.check("files", lambda: _files(folder))
    ledger.check("statement", lambda: _statement(folder), needs=("files",))
    ledger.check("allocation", lambda: _allocation(folder), needs=("files", "statement"))
    ledger.check("parameters", lambda: _parameters(folder), needs=("allocation",))
    ledger.check("ranks", lambda: _ranks(folder), needs=("allocation",))
    ledger.check("sizes", lambda: _sizes(folder), needs=("allocation",))
    ledger.check("model card", lambda: _card(folder), needs=("allocation",), source="card")


def _files(folder: Folder) -> str:
    try:
        listed = (folder.path / CHECKSUMS).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise BrokenLinkError(
            f"{CHECKSUMS} is missing: the folder is incomplete, or the stage release did not write it"
        ) from None
    if listed == checksums(folder.digests).encode():
        return f"{len(folder.digests)} files, all as {CHECKSUMS} lists them"
    lines = [line.partition("  ") for line in listed.decode(errors="replace").splitlines()]
    before, now = {name: digest for digest, _, name in lines}, folder.digests
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    found = {"missing": before.keys() - now.keys(), "not listed": now.keys() - before.keys(), "changed": changed}
    told = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names)
    raise BrokenLinkError(
        f"{CHECKSUMS} and the files disagree: {told or 'its lines are not sorted lines of sha256sum'}"
    )


def _statement(folder: Folder) -> str:
    subjects = {s.name: s.digest.sha256 if s.digest else "none" for s in folder.statement.subject}
    files = {name: digest for name, digest in folder.digests.items() if name != STATEMENT}
    for name in sorted(subjects.keys() | files.keys()):
        _same(f"sha256 of {name} in {STATEMENT}", subjects.get(name, "none"), "the file", files.get(name, "none"))
    return f"in-toto statement of SLSA provenance over {len(subjects)} files"


def _allocation(folder: Folder) -> str:
    statement, allocation = folder.statement, folder.allocation
    digest, variant = folder.digests["allocation.json"], statement.variant
    _same("allocation.json", digest, STATEMENT, statement.digests.get(f"data/allocation/{variant}.json"))
    _same("variant of allocation.json", allocation.variant, f"variant of {STATEMENT}", variant)
    _same("by-product", statement.byproducts[0].name, "variant's results", f"results/{variant}.json")
    if folder.quantization:
        provenance, base = folder.quantization.provenance, "data/raw/model/"
        weights = {name.removeprefix(base): d for name, d in statement.digests.items() if name.startswith(base)}
        healed = statement.digests.get(f"{variant} before healing", "none")
        _same("sha256 of allocation.json in config.json", provenance.allocation_sha256, "the file", digest)
        _same("variant of config.json", provenance.variant, "allocation.json", variant)
        _same("weights of config.json that were healed", provenance.healed_from_sha256 or "none", STATEMENT, healed)
        _same("base model of config.json", provenance.base_model_sha256, STATEMENT, weights_sha256(weights))
    for name, recorded in allocation.inputs.items():
        path = f"data/spectrum/{allocation.spectrum}/{name}"
        _same(f"{name} of allocation.json", recorded, STATEMENT, statement.digests.get(path))
    return f"sha256 {digest}"


def _parameters(folder: Folder) -> str:
    """The allocation's own header against the parameters of the statement."""
    header = read_json(folder.path / "allocation.json")
    parameters = folder.statement.parameters
    asked = {key: value for key, value in parameters["variant"].items() if key != "name"}
    for key, value in flat(asked | parameters.get("preset", {})).items():
        _same(f"{key} of allocation.json", str(header.get(key)), f"{key} of {STATEMENT}", value)
    return f"{len(flat(parameters))} parameters, those of the allocation among them as it has them"


def _ranks(folder: Folder) -> str:
    allocation, (shapes, _) = folder.allocation, folder.tensors
    modules = dict(folder.quantization.modules) if folder.quantization else {}
    if allocation.embedding_bits:
        _embedding(modules, allocation.embedding_bits, folder)
    for unit in allocation.units:
        _same(f"full_rank of {unit.name}", unit.full_rank, "its shape", min(unit.out_features, unit.in_features))
        _same(f"price of {unit.name}", unit.price, f"{unit.form} of rank {unit.rank}", unit.price_of_form)
        if unit.form == "dense":
            _same(f"rank of {unit.name}, which is dense,", unit.rank, "full_rank", unit.full_rank)
        for tensor, shape in _expected(unit, modules):
            stored = shapes.get(tensor)
            transposed = unit.form == "dense" and not unit.is_rounded  # Conv1D's
            if stored not in (shape, shape[::-1] if transposed else shape):
                raise BrokenLinkError(f"{tensor}: stored as {stored}, {unit.form} of rank {unit.rank} has {shape}")
            if unit.is_rounded:
                _same(f"type of {tensor}", folder.types[tensor], f"{unit.bits} bits", _type(tensor))
        if unit.is_rounded or unit.bytes is not None:
            size = unit.bytes_of_form(allocation.group_size)
            _same(f"bytes of {unit.name}", unit.bytes, f"{unit.form} of rank {unit.rank} in {unit.bits} bits", size)
        rank = None if unit.form == "dense" else unit.rank
        grid = (unit.bits, allocation.group_size) if unit.is_rounded else (None, None)
        asked = (unit.form, rank, unit.out_features // len(unit.members), unit.in_features, *grid)
        for member in unit.members:
            spec = modules.get(member)
            told = spec and (spec.form, spec.rank, spec.out_features, spec.in_features, spec.bits, spec.group)
            if spec or unit.form != "dense" or unit.is_rounded:
                _same(f"form, rank, out, in, bits, group of {member} in config.json", told, "allocation.json", asked)
    if unknown := modules.keys() - {member for unit in allocation.units for member in unit.members}:
        raise BrokenLinkError(f"{min(unknown)}: in config.json, not in allocation.json")
    return f"{len(allocation.units)} units: shapes of the weights, config.json and allocation.json agree"


def _embedding(modules: dict[str, Spec], bits: int, folder: Folder) -> None:
    """Check the input embedding, and a head of its own, and take them off the other modules."""
    from drank.model.forms import stored_shapes

    found = [name for name, spec in modules.items() if spec.form == "embedding"]
    _same("embeddings in config.json", bool(found), "embedding_bits of allocation.json", True)
    specs = {name: modules.pop(name) for name in found}
    for name, spec in specs.items():
        _same(f"bits of {name}", spec.bits, "embedding_bits of allocation.json", bits)
    for tensor, shape in stored_shapes(specs).items():
        _same(f"shape of {tensor}", folder.tensors[0].get(tensor), "config.json", shape)
        _same(f"type of {tensor}", folder.types[tensor], f"{bits} bits", "BF16" if tensor.endswith(SCALES) else "I8")


def _type(tensor: str) -> str:
    """The type of a rounded unit's tensor, by safetensors' name for it."""
    if tensor.endswith(".places"):
        return "I32"
    return "BF16" if tensor.endswith(SCALES) else "U8"


def _expected(unit: UnitRow, modules: Mapping[str, Spec]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that a unit is stored in."""
    from drank.model.forms import stored_shapes

    told = {"form": unit.form, "rank": unit.rank, "in_features": unit.in_features}
    told["out_features"] = unit.out_features // len(unit.members)
    unknown = Spec.model_construct()  # of a module that config.json lacks; a rank of 0 is a finding, no fault of ours
    told |= {"bits": unit.bits} if unit.is_rounded else {}
    specs = {member: modules.get(member, unknown).model_copy(update=told) for member in unit.members}
    yield from stored_shapes(specs).items()


def _sizes(folder: Folder) -> str:
    allocation, results, (_, n_numbers) = folder.allocation, folder.statement.results, folder.tensors
    price = sum(unit.price for unit in allocation.units)
    stored = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    kept = price / allocation.targeted_parameters
    _same("price of allocation.json", allocation.price, "sum over its units", price)
    _same("budget of allocation.json", allocation.budget, "price + slack", price + allocation.slack)
    _same("kept_ratio of allocation.json", allocation.kept_ratio, "price / parameters", kept)
    _same("kept_ratio of the results", results.get("kept_ratio"), "allocation.json", kept)
    if allocation.bytes is not None:
        _same(
            "bytes of allocation.json",
            allocation.bytes,
            "sum over its units",
            sum(u.bytes or 0 for u in allocation.units),
        )
    if allocation.bytes_budget is not None:
        if (allocation.bytes or 0) > allocation.bytes_budget:
            raise BrokenLinkError(f"bytes of allocation.json are {allocation.bytes}, above {allocation.bytes_budget}")
        if allocation.bytes_ratio is not None:
            may = int(allocation.bytes_ratio * (2 * allocation.targeted_parameters) + 1e-6)  # of bfloat16
            _same("bytes_budget of allocation.json", allocation.bytes_budget, "bytes_ratio of the linears", may)
    _same("parameters of the results", results.get("parameters"), "numbers in the weights", n_numbers)
    _same("bytes of the results", results.get("bytes"), "size of the weight files", stored)
    shares, objective = [unit.objective_share for unit in allocation.units], allocation.objective.value
    # ASVD's search compresses by scores up to its objective; that of every other rule is a sum.
    if allocation.allocation == "sensitivity":
        within = all(unit.form == "dense" or unit.objective_share <= objective for unit in allocation.units)
    else:
        within = math.isclose(math.fsum(shares), objective, rel_tol=1e-9, abs_tol=1e-12)
    if not within:
        raise BrokenLinkError(
            f"objective of allocation.json is {objective}, its units' shares sum to {math.fsum(shares)}, "
            f"the largest is {max(shares)}"
        )
    return f"{kept:.4f} of the targeted parameters kept, {n_numbers:,} parameters, {stored:,} bytes"


def _card(folder: Folder) -> str:
    if (made_by := folder.statement.versions.get("drank")) != __version__:
        raise UncheckableError(f"drank {made_by} wrote the card, this is {__version__}: its wording may be another")
    document = read_json(folder.path / "allocation.json")
    try:
        expected = card(folder.statement.parameters, document, folder.statement.results)
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenLinkError(f"{STATEMENT} or allocation.json lacks what the card tells: {error!r}") from None
    if (folder.path / CARD).read_text(encoding="utf-8") != expected:
        raise BrokenLinkError(f"{CARD} is not what parameters, allocation and results give; it was edited")
    return "what the parameters, the allocation and the results give"


def _same(what: str, value: Any, where: str, expected: Any) -> None:
    if value != expected or value is None:
        raise BrokenLinkError(f"{what} is {value}, but {where} has {expected}")
