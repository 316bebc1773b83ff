"""An exported model, a folder or a single file of one: back to the released folder that it was made of.

From an export alone nobody can say that its weights are the released folder's in another form. Where that folder is at
hand it is exported again; elsewhere the link cannot be checked.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from drank.audit.artefacts import locate
from drank.audit.folder import CHECKS, Folder, check_unit, same
from drank.audit.ledger import BrokenLinkError, Ledger, UncheckableError
from drank.audit.repository import Record, present_stages
from drank.project.documents import ExportDocument, Quantization, read_document
from drank.project.files import file_sha256, reading
from drank.project.state import outs_of
from drank.serving.export import EXPORT, ExportError, check, from_metadata, origin, versions, write
from drank.serving.remote_code import MODULE, WRITTEN, released_config
from drank.steps.release import CHECKSUMS, STATEMENT, checksums


class Exported(Folder):
    """A folder with papers of an export, or a file without one beside it, whose metadata are all its papers."""

    @property
    def file(self) -> Path | None:
        """The file that is audited alone."""
        return self.path if self.path.is_file() else None

    @cached_property
    def papers(self) -> ExportDocument:
        return parse_metadata(self.path) if self.file else read_document(self.path / EXPORT, ExportDocument)

    @property
    def md5(self) -> str:
        """The hash that DVC has for the released folder."""
        return self.papers.model_md5 or "none"

    @cached_property
    def quantization(self) -> Quantization | None:
        """None where layers are not those of the released folder's config.json."""
        return Folder(self.path).quantization if self.is_compressed else None

    @property
    def is_compressed(self) -> bool:
        """True for the released folder itself with code for its receiver."""
        return (self.path / f"{MODULE}.py").exists()

    @property
    def carriers(self) -> list[Path]:
        """Files whose format has metadata."""
        return sorted(file for file in self.path.iterdir() if file.suffix in METADATA)


def exported_at(path: Path) -> Exported | None:
    """The export that a path leads to, None if there is none: a file in a folder with papers stands for the folder."""
    folder = path.parent if path.is_file() else path
    return Exported(folder) if (folder / EXPORT).is_file() else Exported(path) if path.is_file() else None


def parse_metadata(file: Path) -> ExportDocument:
    """The papers in a file's metadata.

    Raises:
        UncheckableError: no metadata of this format are known here, or the package that reads them is missing.
        FileError: the file is damaged, or has none of drank's.
    """
    if file.suffix not in METADATA:
        raise UncheckableError(f"{file.name}: metadata are known of {', '.join(METADATA)}; audit the folder around it")
    with reading(file, f"a {file.suffix} file", Exception):
        pairs = METADATA[file.suffix](file)
    return from_metadata(pairs, f"metadata of {file.name}")


def _of_gguf(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def _of_onnx(file: Path) -> dict[str, Any]:
    import onnx

    return {pair.key: pair.value for pair in onnx.load(file, load_external_data=False).metadata_props}


def _of_openvino(file: Path) -> dict[str, Any]:
    return {node.tag: node.get("value") for node in ElementTree.parse(file).iterfind("./rt_info//*[@value]")}


METADATA: dict[str, Callable[[Path], dict[str, Any]]] = {".gguf": _of_gguf, ".onnx": _of_onnx, ".xml": _of_openvino}


def check_exported(ledger: Ledger, exported: Exported) -> None:
    """Every link that an export alone can show."""

    def link(name: str, found: Callable[[Exported], str], *needs: str) -> None:
        ledger.check(name, partial(found, exported), needs)

    if exported.file:
        link("export", _told)
        return
    of_folder = {name: found for name, (found, *_) in CHECKS.items()}
    link("files", of_folder["files"])
    link("export", _export, "files")
    if exported.carriers:
        link("metadata", _metadata, "export")
    link("allocation", of_folder["allocation"], "export")
    link("parameters", of_folder["parameters"], "allocation")
    if exported.is_compressed:
        link("ranks", of_folder["ranks"], "allocation")
        link("sizes", of_folder["sizes"], "allocation")
        link("weights", _unchanged, "allocation")
    else:
        link("ranks", _units, "allocation")


def _told(exported: Exported) -> str:
    papers = exported.papers
    options = "".join(f", {key} {value}" for key, value in papers.options.items())
    return f"{papers.form}{options}, of variant {papers.variant}; allocation of sha256 {papers.allocation_sha256}"


def _export(exported: Exported) -> str:
    """export.json against the statement and the allocation that the export carries."""
    papers, statement = exported.papers, exported.statement
    # A released folder's SHA256SUMS lists what its statement is over, and the statement.
    listed = {s.name: s.digest.sha256 for s in statement.subject if s.digest} | {STATEMENT: exported.digests[STATEMENT]}
    same(f"variant of {EXPORT}", papers.variant, STATEMENT, statement.variant)
    same(f"allocation of {EXPORT}", papers.allocation_sha256, "the file", exported.digests["allocation.json"])
    same(f"base model of {EXPORT}", papers.base_model_sha256, STATEMENT, statement.base_model_sha256)
    same(f"sha256sums of {EXPORT}", papers.sha256sums, STATEMENT, _sha256(checksums(listed)))
    return _told(exported)


def _metadata(exported: Exported) -> str:
    papers = dict(exported.papers)
    for file in exported.carriers:
        for key, value in parse_metadata(file):
            same(f"{key} in the metadata of {file.name}", value, EXPORT, papers[key])
    return f"{', '.join(file.name for file in exported.carriers)}: as {EXPORT} has it"


def _units(exported: Exported) -> str:
    for unit in exported.allocation.units:
        check_unit(unit, exported.allocation.group_size)
    return f"{len(exported.allocation.units)} units of allocation.json by themselves; weights have another form"


def _unchanged(exported: Exported) -> str:
    """The released folder's own files, and two lines of code."""
    code = exported.path / f"{MODULE}.py"
    if others := [name for name in exported.digests if name.endswith(".py") and name != code.name]:
        raise BrokenLinkError(f"{others[0]}: code that drank does not write")
    if not WRITTEN.fullmatch(code.read_text(encoding="utf-8")):
        raise BrokenLinkError(f"{code.name}: not the two lines that drank writes")
    config = released_config((exported.path / "config.json").read_text(encoding="utf-8"))
    found = exported.digests | {"config.json": _sha256(config)}
    for subject in exported.statement.subject:
        same(f"sha256 of {subject.name}", found.get(subject.name), STATEMENT, subject.digest and subject.digest.sha256)
    return f"{len(exported.statement.subject)} files of the released folder; {code.name} is the two lines of drank's"


def check_weights(
    ledger: Ledger, exported: Exported, record: Record | None, root: Path | None, rebuilt: Path | None
) -> None:
    """The released folder, and the export made of it again; ``rebuilt`` is where that folder is, if it is told."""
    with TemporaryDirectory() as scratch:
        released, again = Path(scratch, "released"), Path(scratch, "again")
        find = partial(_released, exported, record, root, rebuilt, released)
        ledger.check("released folder", find, ("export",), "artefacts")
        if "weights" not in ledger.links:
            ledger.check("weights", partial(_again, exported, released, again), ("released folder",), "artefacts")


def _released(exported: Exported, record: Record | None, root: Path | None, rebuilt: Path | None, place: Path) -> str:
    """The released folder, as links in ``place``, against the papers of the export."""
    papers = exported.papers
    if rebuilt is not None:
        files = {name: rebuilt / name for name in (*Folder(rebuilt).digests, CHECKSUMS)}
    elif record and root:
        commit = record.commit.sha if record.commit else None
        files = dict(locate(root, record.path, exported.md5, outs_of(present_stages(root)), commit).files)
    else:
        raise UncheckableError("not at hand: audit in the repository that has it, or name it by --rebuilt")
    place.mkdir()
    for name, file in files.items():
        (place / name).symlink_to(file.resolve())
    if rebuilt and (found := file_sha256(place / CHECKSUMS)) != papers.sha256sums:
        raise UncheckableError(f"{rebuilt}: another folder: {CHECKSUMS} of sha256 {found}, not {papers.sha256sums}")
    told = CHECKS["files"][0](Folder(place))
    check(papers.form, papers.options)
    for key, value in origin(place, papers.form).items():
        same(f"{key} of the export", getattr(papers, key), "the released folder", value)
    return f"{rebuilt or (record and record.path)}: {told}"


def _again(exported: Exported, released: Path, place: Path) -> str:
    """The export made again with the same papers: the same bytes, or another's."""
    papers = exported.papers
    try:
        now = versions(papers.form)
    except ExportError as error:
        raise UncheckableError(f"cannot be exported again here: {error}") from None
    place.mkdir()
    write(released, place, papers)
    made = Folder(place).digests
    files = {name: exported.path / name for name in made}
    if exported.file:  # and what it reads beside it: model.onnx.data, model.bin
        (own,) = [name for name in made if name.endswith(exported.file.suffix)]
        beside = [name for name in made if name.startswith(f"{Path(own).stem}.")]
        files = {name: exported.path.parent / name for name in beside} | {own: exported.file}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise UncheckableError(f"{missing[0]} is not beside it")
    differing = [name for name, file in files.items() if file_sha256(file) != made[name]]
    if not differing:
        return f"the released folder, exported again, has the same bytes in {len(files)} files"
    other = [f"{key} {then}, here {now.get(key)}" for key, then in papers.versions.items() if now.get(key) != then]
    told = f"the released folder, exported again, has other bytes in {', '.join(differing)}"
    if other:
        raise UncheckableError(f"{told}, but the export was made by {'; '.join(other)}")
    raise BrokenLinkError(told)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
