"""Files written whole or not at all, and read with errors that name them. Every stage writes through here.

JSON and safetensors only. Whatever is written is a function of its content: keys are sorted, modes are fixed.
A reader never meets half a file, since a finished temporary sibling is renamed onto the destination. Each function
raises FileError, with the name of the file, where the system refuses to read or write; readers also if it is missing or
damaged.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drank.project.refusals import FileError, check_access, refusals

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

# The form of what is written here, which stages depend on in the place of this module: another number reruns them all.
FORMAT = 1
FILE_MODE = 0o644  # safetensors leaves 0600, which a colleague, or a cache shared by a group, cannot read
FOLDER_MODE = 0o755
WRITABLE = 0o222


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically; missing parent folders are created."""
    with replacing_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, with line ends as they are, as ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document as ``write_bytes``: sorted keys, indented by two, one newline at the end.

    Raises:
        FileError: a number is NaN or infinite, which JSON cannot say.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise FileError(f"{path}: not written: a number in it is NaN or infinite ({error})") from None
    write_text(path, f"{text}\n")


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    with reading(path, "JSON", ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def reading(path: Path, form: str, *damaged: type[Exception]) -> Iterator[None]:
    """Errors of reading a file as one of the user; ``damaged`` are raised for content that is not ``form``."""
    try:
        check_access(path)
        yield
    except FileNotFoundError:
        raise FileError(f"{path}: not found; if an earlier stage writes it, `dvc repro` runs that first") from None
    except FileError:
        raise
    except damaged as error:
        raise FileError(f"{path}: damaged, not {form}: {error}; fetch or build it again") from None


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write named tensors as safetensors, atomically; equal tensors give equal bytes.

    No metadata: safetensors keeps it in a hash map, whose order changes from save to save (huggingface/safetensors
    issue 584).
    """
    from safetensors.torch import save_file

    with replacing_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read all tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    with _safetensors(path):
        return load_file(path)


def read_arrays(path: Path) -> dict[str, "ndarray"]:
    """``read_tensors`` as NumPy arrays, for stages that can do without the seconds of torch."""
    from safetensors.numpy import load_file

    with _safetensors(path):
        return load_file(path)


def read_rows(path: Path, n_rows: int) -> dict[str, "Tensor"]:
    """The first rows of every tensor of a safetensors file; the rest of it is not read.

    Raises:
        FileError: the file holds fewer rows than asked.
    """
    from safetensors import safe_open

    with _safetensors(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        held = min(((*part.get_shape(), 0)[0] for part in slices.values()), default=0)
        if held < n_rows:
            raise FileError(f"{path}: holds {held} rows, {n_rows} were asked; does it belong to this allocation?")
        return {name: part[:n_rows] for name, part in slices.items()}


def _safetensors(path: Path) -> AbstractContextManager[None]:
    from safetensors import SafetensorError

    return reading(path, "safetensors", SafetensorError, RuntimeError)  # torch's, if it is cut while it is read


Values = TypeVar("Values")


class _Folder(MutableMapping[str, Values]):
    """The files of a folder with one suffix, by their names without it."""

    suffix = ""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __contains__(self, name: object) -> bool:
        return self._file(str(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        for file in sorted(self.path.rglob(f"*{self.suffix}")):
            yield file.relative_to(self.path).as_posix().removesuffix(self.suffix)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{self.suffix}"


class TensorFolder(_Folder[Mapping[str, "Tensor"]]):
    """A folder of safetensors files as a mapping: ``folder[name]`` has the tensors of ``<name>.safetensors``."""

    suffix = ".safetensors"

    def __getitem__(self, name: str) -> dict[str, "Tensor"]:
        return read_tensors(self._file(name))

    def __setitem__(self, name: str, tensors: Mapping[str, "Tensor"]) -> None:
        write_tensors(self._file(name), tensors)

    def rows(self, name: str, n_rows: int) -> dict[str, "Tensor"]:
        """The first rows of every tensor of ``name``, as ``read_rows``."""
        return read_rows(self._file(name), n_rows)


class JsonLinesFolder(_Folder[list[Any]]):
    """A folder of JSON lines as a mapping: ``folder[name]`` has the values of ``<name>.jsonl``."""

    suffix = ".jsonl"

    def __getitem__(self, name: str) -> list[Any]:
        file = self._file(name)
        with reading(file, "JSON lines", ValueError), file.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def __setitem__(self, name: str, values: Iterable[Any]) -> None:
        lines = (json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n" for value in values)
        write_text(self._file(name), "".join(lines))


def check_plain(folder: Path) -> None:
    """Refuse a folder of others' that cannot be read to its end. Links to files, as DVC's to its cache, may be in it.

    Raises:
        FileError: it holds a pipe, a device, a link that leads nowhere or to a folder, or a name that is not UTF-8.
    """
    for path in sorted(folder.rglob("*")):
        name = str(path).encode("utf-8", "backslashreplace").decode()
        if name != str(path):
            raise FileError(f"{name}: the name is not UTF-8; rename or remove it")
        if not (path.is_file() or (path.is_dir() and not path.is_symlink())):
            raise FileError(f"{name}: neither a file, a folder nor a link to a file; remove it")


def copy_files(source: Path, destination: Path) -> None:
    """Copy a file, or the files of a folder into one that is there.

    A file that nobody may write is a link to DVC's cache, and gets one name more where the file system has hard links;
    all others are copied.
    """
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        copy = destination / file.name if destination.is_dir() else destination
        if not file.stat().st_mode & WRITABLE:
            with suppress(OSError):
                copy.hardlink_to(file)
                continue
        shutil.copyfile(file, copy)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_sha256(digests: Mapping[str, str]) -> str:
    """One hash for the weights of a model, from the SHA-256 of each of its files by name.

    That of the one file, as ``sha256sum`` prints it; of shards, the hash of the lines that it prints, sorted by name.
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def folder_sha256(folder: Path) -> str:
    """:func:`weights_sha256` of a model's folder."""
    return weights_sha256({file.name: file_sha256(file) for file in folder.glob("*.safetensors")})


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for the time of a ``with`` block; leftovers of a killed run are removed first.

    Raises:
        FileError: another process has it.
    """
    with refusals(path):
        if not path.is_dir():
            _remove(path)
        path.mkdir(parents=True, exist_ok=True)
        with _own(path):
            for left in path.iterdir():
                _remove(left)
            yield path


@contextmanager
def replacing_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``destination`` when the block ends well.

    The block writes to the hidden sibling ``.<name>.partial``. If it raises, that is removed and the
    destination stays as it was. No rename replaces a folder that has content, so the old one steps aside to
    ``.<name>.old`` first; a run killed between the two renames is repaired by the next call.

    Raises:
        FileError: another process fills it.
    """
    old = destination.with_name(f".{destination.name}.old")
    partial = _partial(destination)
    with refusals(destination), scratch_folder(partial):
        if old.exists() and not destination.exists():
            old.rename(destination)
        _remove(old)
        yield partial
        _fix_modes(partial)
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
        _remove(old)


def _partial(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.partial")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file to fill, which takes the place of ``path`` when the block ends well, as ``replacing_folder``."""
    partial = _partial(path)
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        with _own(partial):
            try:
                yield partial
                partial.chmod(FILE_MODE)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)  # safetensors puts another file in its place


@contextmanager
def _own(partial: Path) -> Iterator[None]:
    """A file or folder that is this process's alone for a while, and is removed at the end unless it was renamed.

    The lock is the system's, on the file itself: it needs no file of its own, and ends with the process.

    Raises:
        FileError: another process has it.
    """
    taken = FileError(f"{partial}: another process is writing this at the moment; wait until it has ended, or end it")
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        raise taken from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError:
            pass  # a file system without locks
        if not _is_at(descriptor, partial):
            raise taken
        try:
            yield
        finally:
            if _is_at(descriptor, partial):
                _remove(partial)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """True if an open file or folder still has this name."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _fix_modes(folder: Path) -> None:
    folder.chmod(FOLDER_MODE)
    for path in folder.rglob("*"):
        if path.is_dir() or path.stat().st_mode & WRITABLE:  # the rest are links to DVC's cache, whose mode stays
            path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
