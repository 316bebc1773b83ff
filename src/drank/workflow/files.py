"""Files written whole or not at all, and read with errors that name them. Every stage writes through here.

JSON and safetensors only. Whatever is written is a function of its content: keys are sorted, modes are fixed.
A reader never meets half a file, since a finished temporary sibling is renamed onto the destination.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FILE_MODE = 0o644  # safetensors leaves 0600, which a colleague, or a cache shared by a group, cannot read
FOLDER_MODE = 0o755


class FileError(ValueError):
    """A file is missing, damaged, or cannot hold what it was given; the message names it."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, with line ends as they are; missing parent folders are created."""
    with _replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically: sorted keys, indented by two, one newline at the end.

    Raises:
        FileError: a number is NaN or infinite, which JSON cannot say; the message names its key.
    """
    for key, number in _numbers(value):
        if not math.isfinite(number):
            raise FileError(f"{path}: not written: '{key}' is {number}, and JSON has finite numbers only")
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        FileError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(_missing(path)) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged, not JSON: {error}; fetch or build it again") from None


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically; equal tensors and metadata give equal bytes.

    At most one metadata key: safetensors keeps its metadata in a hash map, so two keys come out in an order
    that changes from save to save (huggingface/safetensors issue 584). Several facts fit into one JSON string.

    Raises:
        FileError: more than one metadata key.
    """
    from safetensors.torch import save_file

    if metadata is not None and len(metadata) > 1:
        raise FileError(
            f"{path}: not written: {len(metadata)} metadata keys ({', '.join(metadata)}), but bytes are "
            f"reproducible with 1 at most; put them into one JSON string"
        )
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _replacing_file(path) as partial:
        save_file(contiguous, partial, metadata=dict(metadata) if metadata else None)


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read all tensors of a safetensors file, on the CPU.

    Raises:
        FileError: the file is missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileError(_missing(path)) from None
    except SafetensorError as error:
        raise FileError(f"{path}: damaged, not safetensors: {error}; fetch or build it again") from None


def read_rows(path: Path, names: Sequence[str], n_rows: int) -> tuple["Tensor", ...]:
    """The first rows of named tensors; the rest of the file is not read.

    Raises:
        FileError: the file is missing, damaged, lacks a name, or holds fewer rows than asked.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in names]
            held = min(part.get_shape()[0] for part in slices)
            if held < n_rows:
                raise FileError(f"{path}: holds {held} rows, {n_rows} were asked; does it belong to this allocation?")
            return tuple(part[:n_rows] for part in slices)
    except FileNotFoundError:
        raise FileError(_missing(path)) from None
    except SafetensorError as error:
        raise FileError(f"{path}: damaged, not safetensors: {error}; fetch or build it again") from None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Hexadecimal SHA-256 of a folder's files: of the lines ``<sha256>  <relative path>``, sorted by path.

    The lines are what ``sha256sum`` prints. Times and modes do not count.
    """
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return _listing_sha256({name: file_sha256(folder / name) for name in names})


def weights_sha256(digests: Mapping[str, str]) -> str:
    """One hash for the weights of a model, from the SHA-256 of each of its files by name.

    That of the one file, as ``sha256sum`` prints it; of shards, the hash of the lines that it prints, sorted by name.
    """
    return next(iter(digests.values())) if len(digests) == 1 else _listing_sha256(digests)


def _listing_sha256(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for the time of a ``with`` block; what a killed run left there is removed first."""
    _remove(path)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        _remove(path)


@contextmanager
def replacing_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``destination`` when the block ends well.

    The block writes to the hidden sibling ``.<name>.partial``. If it raises, that is removed and the
    destination stays as it was. No rename replaces a folder that has content, so the old one steps aside to
    ``.<name>.old`` first; a run killed between the two renames is repaired by the next call.
    """
    old = destination.with_name(f".{destination.name}.old")
    if old.exists() and not destination.exists():
        old.rename(destination)
    _remove(old)
    with scratch_folder(destination.with_name(f".{destination.name}.partial")) as partial:
        yield partial
        _fix_modes(partial)
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
    _remove(old)


@contextmanager
def _replacing_file(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.chmod(FILE_MODE)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fix_modes(folder: Path) -> None:
    folder.chmod(FOLDER_MODE)
    for path in folder.rglob("*"):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a nested document with the dotted key that leads to it."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")


def _missing(path: Path) -> str:
    return f"{path}: not found; if an earlier stage writes it, `dvc repro` runs that first"
