"""Exports: a model folder in another program's form, with the papers that lead back to the folder it was made of.

Every form is a module of this package, imported when it is asked for, whose ``write(model, folder, *, provenance,
**options)`` fills an empty folder. ``provenance`` goes into the metadata of the file where its format has a place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from drank.model.checksums import check_released
from drank.project.documents import Config, ExportDocument, StatementDocument, parse_document, read_document
from drank.project.dvc import dvc_md5
from drank.project.files import file_sha256, write_bytes, write_json, write_text
from drank.steps.release import CHECKSUMS, STATEMENT, checksums

EXPORT = "export.json"
ALLOCATION = "allocation.json"
PREFIX = "drank."
NO_TEXTS = ("format_version", "options", "versions")


class ExportError(ValueError):
    """A folder that cannot be exported, or a place where it cannot be written; the message says why and what to do."""


@dataclass(frozen=True)
class Form:
    """A form to export to.

    Attributes:
        told: one line on size and use, for the terminal.
        weights: pattern of its weight files.
        packages: distributions whose versions decide the bytes; ``extra`` of drank installs them.
        options: values that each option may have, the first of them where none is asked.
        plain: True if uncompressed models can be exported to it, too.
    """

    told: str
    weights: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    plain: bool = True


INT8 = {"int8": (False, True)}
GGUF_TYPES = ("bf16", "f16", "f32", "q8_0")
FORMS = {
    "dense": Form("plain; nothing is saved in size", "*.safetensors", plain=False),
    "onnx": Form("ONNX, with its factors", "*.onnx*", ("onnx", "onnxscript"), "onnx", INT8),
    "openvino": Form(
        "OpenVINO, with its factors", "*.bin", ("onnx", "onnxscript", "openvino", "nncf"), "openvino", INT8
    ),
    "gguf": Form(
        "GGUF, multiplied out: nothing is saved but by its type; factors would need C++ in llama.cpp", "*.gguf",
        ("gguf",), options={"type": GGUF_TYPES},
    ),
    "remote-code": Form("compressed as it was, for trust_remote_code=True", "*.safetensors", plain=False),
}  # fmt: skip


def module_of(form: str) -> Any:
    return import_module(f"drank.serving.{form.replace('-', '_')}")


def describe(model: Path, form: str, options: Mapping[str, Any]) -> ExportDocument:
    """The papers of an export; nothing is loaded yet. Options that are left out have their first value.

    Raises:
        ExportError: a form or option that there is not, a package or program that is missing, or a plain model that
            was not released or that the form is not for.
        FileError: config.json, or the statement of a released folder, cannot be read.
    """
    check(form, options)
    options = {name: values[0] for name, values in FORMS[form].options.items()} | dict(options)
    return ExportDocument(format_version=1, form=form, options=options, versions=versions(form), **origin(model, form))


def check(form: str, options: Mapping[str, Any]) -> None:
    """Refuse forms and options that there are not."""
    if form not in FORMS:
        raise ExportError(f"form {form!r}: must be one of {', '.join(FORMS)}")
    takes = FORMS[form].options
    for name, value in options.items():
        if value not in takes.get(name, ()):
            known = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in takes.items())
            raise ExportError(f"{name} {value}: --{form} takes {known or 'no option'}")


def versions(form: str) -> dict[str, str]:
    """Versions of what decides the bytes of an export.

    Raises:
        ExportError: a package or program is missing; the message says how to install it.
    """
    asked = FORMS[form]
    try:
        found = {name: version(name) for name in ("drank", "safetensors", "torch", "transformers", *asked.packages)}
    except PackageNotFoundError as error:
        raise ExportError(f"--{form} needs the package {error.name}: pip install 'drank[{asked.extra}]'") from None
    return found | getattr(module_of(form), "tools", dict)()


def origin(model: Path, form: str) -> dict[str, Any]:
    """Names and hashes of the folder that is exported; its two own hashes only if it is a released one."""
    quantization = read_document(model / "config.json", Config).quantization_config
    if quantization is None and not FORMS[form].plain:
        raise ExportError(f"{model}: not compressed, so plain already: copy it as it is")
    released = (model / CHECKSUMS).is_file()
    if quantization is not None:
        made = {key: value for key, value in quantization.provenance if key in ExportDocument.model_fields}
    elif released:
        statement = read_document(model / STATEMENT, StatementDocument)
        made = {
            "variant": statement.variant,
            "allocation_sha256": file_sha256(model / ALLOCATION),
            "base_model_sha256": statement.base_model_sha256,
        }
    else:
        raise ExportError(f"{model}: neither compressed nor released, so nothing says what made it")
    return made | ({"sha256sums": file_sha256(model / CHECKSUMS), "model_md5": dvc_md5(model)} if released else {})


def write(model: Path, folder: Path, papers: ExportDocument) -> None:
    """Fill an empty folder with the export and its papers; equal models and papers give equal bytes.

    Raises:
        ChecksumError: the released folder is damaged.
        ExportError: what the form's module refuses.
    """
    check_released(model.glob("*.safetensors"))
    module_of(papers.form).write(model, folder, provenance=as_metadata(papers), **papers.options)
    for paper in (STATEMENT, ALLOCATION):
        if (model / paper).is_file():
            write_bytes(folder / paper, (model / paper).read_bytes())
    write_json(folder / EXPORT, papers.model_dump(exclude_none=True))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    digests = {name: file_sha256(path) for name, path in files.items() if name != CHECKSUMS}
    write_text(folder / CHECKSUMS, checksums(digests))


def as_metadata(papers: ExportDocument) -> dict[str, str]:
    """Papers as pairs of text under ``drank.``: what is no text is JSON."""
    fields = papers.model_dump(exclude_none=True).items()
    return {PREFIX + k: json.dumps(v, sort_keys=True) if k in NO_TEXTS else v for k, v in fields}


def from_metadata(pairs: Mapping[str, Any], where: str) -> ExportDocument:
    """The same backwards; other programs' pairs are passed over.

    Raises:
        FileError: they are no papers.
    """
    own = {key.removeprefix(PREFIX): value for key, value in pairs.items() if key.startswith(PREFIX)}
    texts = (f'"{key}": {value if key in NO_TEXTS else json.dumps(value)}' for key, value in own.items())
    return parse_document("{" + ", ".join(texts) + "}", where, ExportDocument)
