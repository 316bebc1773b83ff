"""A model folder by itself: does it hold together? Needs nothing but the folder."""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from drank import __version__
from drank.audit.ledger import BrokenLinkError, Ledger, UncheckableError
from drank.model.format import SCALES
from drank.project.documents import (
    AllocationDocument,
    Config,
    Quantization,
    StatementDocument,
    UnitRow,
    read_document,
)
from drank.project.dvc import dvc_md5
from drank.project.files import FileError, file_sha256, read_json
from drank.project.state import flat
from drank.steps.release import CARD, CHECKSUMS, STATEMENT, card, checksums


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
    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of every stored tensor, and its type by safetensors' name for it.

        Raises:
            FileError: a weight file is damaged.
        """
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

    @property
    def n_numbers(self) -> int:
        """Numbers of the model: floating-point ones that are no scales, and those stored as integers."""
        from drank.model.forms import numbers_in_integers

        scales = {name + SCALES for name in self.stored}
        plain = (math.prod(shape) for name, (shape, kind) in self.stored.items() if "F" in kind and name not in scales)
        return sum(plain) + (numbers_in_integers(self.quantization.modules) if self.quantization else 0)


def check_folder(ledger: Ledger, folder: Folder) -> None:
    """Every link that the folder alone can show."""
    for name, (check, *needs) in CHECKS.items():
        ledger.check(name, partial(check, folder), tuple(needs), "card" if check is _card else "folder")


def _files(folder: Folder) -> str:
    try:
        listed = (folder.path / CHECKSUMS).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise BrokenLinkError(f"{CHECKSUMS} is missing, or the stage release did not write it") from None
    if listed == checksums(folder.digests).encode():
        return f"{len(folder.digests)} files, all as {CHECKSUMS} lists them"
    lines = [line.partition("  ") for line in listed.decode(errors="replace").splitlines()]
    before, now = {name: digest for digest, _, name in lines}, folder.digests
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]}
    found = {"missing": before.keys() - now.keys(), "not listed": now.keys() - before.keys(), "changed": changed}
    told = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names)
    raise BrokenLinkError(f"{CHECKSUMS} and the files disagree: {told or 'its lines are not those of sha256sum'}")


def _statement(folder: Folder) -> str:
    subjects = {s.name: s.digest.sha256 if s.digest else "none" for s in folder.statement.subject}
    files = {name: digest for name, digest in folder.digests.items() if name != STATEMENT}
    for name in sorted(subjects.keys() | files.keys()):
        same(f"sha256 of {name} in {STATEMENT}", subjects.get(name, "none"), "the file", files.get(name, "none"))
    return f"in-toto statement of SLSA provenance over {len(subjects)} files"


def _allocation(folder: Folder) -> str:
    statement, allocation = folder.statement, folder.allocation
    digest, variant = folder.digests["allocation.json"], statement.variant
    same("allocation.json", digest, STATEMENT, statement.digests.get(f"data/allocation/{variant}.json"))
    same("variant of allocation.json", allocation.variant, f"variant of {STATEMENT}", variant)
    same("by-product", statement.byproducts[0].name, "variant's results", f"results/{variant}.json")
    if folder.quantization:
        provenance = folder.quantization.provenance
        healed = statement.digests.get(f"{variant} before healing", "none")
        same("sha256 of allocation.json in config.json", provenance.allocation_sha256, "the file", digest)
        same("variant of config.json", provenance.variant, "allocation.json", variant)
        same("weights of config.json that were healed", provenance.healed_from_sha256 or "none", STATEMENT, healed)
        same("base model of config.json", provenance.base_model_sha256, STATEMENT, statement.base_model_sha256)
    for name, recorded in allocation.inputs.items():
        path = f"data/spectrum/{allocation.spectrum}/{name}"
        same(f"{name} of allocation.json", recorded, STATEMENT, statement.digests.get(path))
    return f"sha256 {digest}"


def _parameters(folder: Folder) -> str:
    """The allocation's own header against the parameters of the statement."""
    header = read_json(folder.path / "allocation.json")
    parameters = folder.statement.parameters
    asked = {key: value for key, value in parameters["variant"].items() if key != "name"}
    for key, value in flat(asked | parameters.get("preset", {})).items():
        same(f"{key} of allocation.json", str(header.get(key)), f"{key} of {STATEMENT}", value)
    return f"{len(flat(parameters))} parameters, those of the allocation among them as it has them"


def _ranks(folder: Folder) -> str:
    """Every unit by itself, then config.json, then the tensors that config.json asks for."""
    from drank.model.forms import stored_shapes

    allocation = folder.allocation
    modules = dict(folder.quantization.modules) if folder.quantization else {}
    embeddings = {name for name, spec in modules.items() if spec.form == "embedding"}
    same("embeddings in config.json", bool(embeddings), "allocation.json", allocation.embedding_bits is not None)
    for name in embeddings:
        same(f"bits of {name}", modules[name].bits, "embedding_bits of allocation.json", allocation.embedding_bits)
    plain: dict[str, tuple[int, ...]] = {}
    for unit in allocation.units:
        check_unit(unit, allocation.group_size)
        rank = None if unit.form == "dense" else unit.rank
        grid = (unit.bits, allocation.group_size) if unit.is_rounded else (None, None)
        asked = (unit.form, rank, unit.out_features // len(unit.members), unit.in_features, *grid)
        for member in unit.members:
            spec = modules.get(member)
            told = spec and (spec.form, spec.rank, spec.out_features, spec.in_features, spec.bits, spec.group)
            if spec or unit.form != "dense" or unit.is_rounded:
                same(f"form, rank, out, in, bits, group of {member} in config.json", told, "allocation.json", asked)
            else:
                plain[f"{member}.weight"] = asked[2:4]
    if unknown := modules.keys() - embeddings - {member for unit in allocation.units for member in unit.members}:
        raise BrokenLinkError(f"{min(unknown)}: in config.json, not in allocation.json")
    for tensor, shape in (plain | stored_shapes(modules)).items():
        stored, kind = folder.stored.get(tensor, (None, ""))
        if stored is None and folder.quantization is None:
            continue  # a copy of the base model, which may have older names; _sizes counts its numbers
        if stored != shape and not (tensor in plain and stored == shape[::-1]):  # Conv1D's
            raise BrokenLinkError(f"{tensor}: stored as {stored}, its form and rank have {shape}")
        spec = modules.get(tensor.rpartition(".")[0])
        if spec and spec.bits:
            whole = "I8" if spec.form == "embedding" else "I32" if tensor.endswith(".places") else "U8"
            same(f"type of {tensor}", kind, f"{spec.bits} bits", "BF16" if tensor.endswith(SCALES) else whole)
    return f"{len(allocation.units)} units: shapes of the weights, config.json and allocation.json agree"


def check_unit(unit: UnitRow, group_size: int | None) -> None:
    """A unit's figures against what follows from its form, rank, shape and bits."""
    form = f"{unit.form} of rank {unit.rank}"
    same(f"full_rank of {unit.name}", unit.full_rank, "its shape", min(unit.out_features, unit.in_features))
    same(f"price of {unit.name}", unit.price, form, unit.price_of_form)
    if unit.form == "dense":
        same(f"rank of {unit.name}, which is dense,", unit.rank, "full_rank", unit.full_rank)
    if unit.is_rounded or unit.bytes is not None:
        size = unit.bytes_of_form(group_size)
        same(f"bytes of {unit.name}", unit.bytes, f"{form} in {unit.bits} bits", size)


def _sizes(folder: Folder) -> str:
    allocation, results, n_numbers = folder.allocation, folder.statement.results, folder.n_numbers
    price = sum(unit.price for unit in allocation.units)
    n_bytes = sum(file.stat().st_size for file in folder.path.glob("*.safetensors"))
    kept = price / allocation.targeted_parameters
    same("price of allocation.json", allocation.price, "sum over its units", price)
    same("budget of allocation.json", allocation.budget, "price + slack", price + allocation.slack)
    same("kept_ratio of allocation.json", allocation.kept_ratio, "price / parameters", kept)
    same("kept_ratio of the results", results.get("kept_ratio"), "allocation.json", kept)
    same("parameters of the results", results.get("parameters"), "numbers in the weights", n_numbers)
    same("bytes of the results", results.get("bytes"), "size of the weight files", n_bytes)
    _check_bytes(allocation, n_bytes)
    _check_objective(allocation)
    return f"{kept:.4f} of the targeted parameters kept, {n_numbers:,} parameters, {n_bytes:,} bytes"


def _check_bytes(allocation: AllocationDocument, n_bytes: int) -> None:
    """Bytes of the linears against their budget, and those of the weight files against the megabytes asked."""
    if allocation.bytes is not None:
        total = sum(unit.bytes or 0 for unit in allocation.units)
        same("bytes of allocation.json", allocation.bytes, "sum over its units", total)
    if allocation.bytes_budget is not None and (allocation.bytes or 0) > allocation.bytes_budget:
        raise BrokenLinkError(f"bytes of allocation.json are {allocation.bytes}, above {allocation.bytes_budget}")
    if allocation.bytes_ratio is not None:
        may = int(allocation.bytes_ratio * (2 * allocation.targeted_parameters) + 1e-6)  # of bfloat16
        same("bytes_budget of allocation.json", allocation.bytes_budget, "bytes_ratio of the linears", may)
    if allocation.megabytes is not None and n_bytes > allocation.megabytes * 1e6:
        raise BrokenLinkError(f"weight files have {n_bytes:,} bytes, above the budget, {allocation.megabytes} MB")


def _check_objective(allocation: AllocationDocument) -> None:
    """ASVD's search compresses by scores up to its objective; that of every other rule is a sum."""
    shares, objective = [unit.objective_share for unit in allocation.units], allocation.objective.value
    if allocation.allocation == "sensitivity":
        within = all(unit.form == "dense" or unit.objective_share <= objective for unit in allocation.units)
    else:
        within = math.isclose(math.fsum(shares), objective, rel_tol=1e-9, abs_tol=1e-12)
    if not within:
        told = f"shares of its units sum to {math.fsum(shares)}, the largest is {max(shares)}"
        raise BrokenLinkError(f"objective of allocation.json is {objective}, {told}")


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


def same(what: str, value: Any, where: str, expected: Any) -> None:
    """Refuse a value that is not what another place has, or is nothing."""
    if value != expected or value is None:
        raise BrokenLinkError(f"{what} is {value}, but {where} has {expected}")


# By name of the link: its check, and the links that have to hold before.
CHECKS: dict[str, tuple[Any, ...]] = {
    "files": (_files,),
    "statement": (_statement, "files"),
    "allocation": (_allocation, "files", "statement"),
    "parameters": (_parameters, "allocation"),
    "ranks": (_ranks, "allocation"),
    "sizes": (_sizes, "allocation"),
    "model card": (_card, "allocation"),
}
