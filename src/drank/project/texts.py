"""Texts: from their sources to JSON lines and from there to a reader, one document at a time.

Files are ``.csv``, ``.jsonl`` and ``.json`` (lines, or an array) and ``.parquet`` with a column of text or of chat
messages, ``.txt`` with blank lines between documents, any of them with ``.gz``, or a ``.zip`` that holds one of these.
"""

import csv
import gzip
import json
import logging
import re
import sys
import zipfile
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate, groupby, islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from drank.project.files import FileError, reading, replacing_file, scratch_folder
from drank.project.params import TextSource
from drank.project.refusals import check_access
from drank.project.sources import COMMIT, SourceError, advise_pin, file_of, hub_name, scheme_of, told

log = logging.getLogger(__name__)

BOMB = 200  # times its packed size: texts unpack to 3 to 20 times, zeros to 1032 times in gzip and without end in bzip2
GAP = re.compile(r"[\s,]*")  # between the elements of an array
SMALL = 2**26  # bytes that anything may unpack to


def fetch_text(asked: TextSource, destination: Path, downloads: Path, root: Path = Path()) -> None:
    """Write a text as JSON lines ``{"text": ...}``, one document per line, in its order, exactly as received.

    Arguments:
        destination: the ``.jsonl`` file to write; left alone when anything fails.
        downloads, root: as in ``file_of``.

    Raises:
        SourceError: the source cannot be had, lacks the member, column or split, holds no text, or fewer documents
            than asked.
    """
    source, n_documents, n_characters, blank = asked.source, 0, 0, True
    rows = _hub_rows(asked) if scheme_of(asked) == "hub" else _file_rows(asked, downloads, root)
    # ASCII with JSON's escapes: a document is one line also to readers that split lines at U+0085 or U+2028.
    with replacing_file(destination) as partial, partial.open("w", encoding="ascii") as lines, closing(rows):
        for row in islice(rows, asked.documents):
            n_documents += 1
            document = _document(f"{source}: document {n_documents}", row, asked)
            n_characters += len(str(document))
            blank = blank and not str(document).strip()
            lines.write(json.dumps({"text": document}, default=str) + "\n")
        if blank:
            raise SourceError(f"{source}: holds no text ({n_documents} documents, all of them blank)")
        if n_documents < (asked.documents or 0):
            raise SourceError(
                f"{source}: holds {n_documents} documents, documents = {asked.documents} were asked; ask for fewer"
            )
    log.info("%s: %d documents, %d characters", source, n_documents, n_characters)


def check_beginning(asked: TextSource, root: Path = Path()) -> None:
    """Refuse a local file that is no text, or whose first document is none; one that is packed is not looked into.

    Raises:
        SourceError, FileError: as ``fetch_text``.
    """
    scheme_of(asked)
    if asked.source.lower().endswith((".gz", ".zip")):
        return
    unhashed = asked.model_copy(update={"sha256": None})  # a hash takes a reading of the whole file
    with TemporaryDirectory() as nowhere, closing(_file_rows(unhashed, Path(nowhere), root)) as rows:
        for row in islice(rows, 1):
            _document(f"{asked.source}: document 1", row, asked)


class Text(Sequence[str]):
    """The documents of a file that ``fetch_text`` wrote, each read, and rendered if it is chat, when it is asked for.

    Raises:
        FileError: the file is missing, or a line is no JSON.
        SourceError: the tokenizer has no chat template, or one that refuses the messages.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        with reading(path, "JSON lines"):
            self._lines, self._tokenizer = path.open("rb"), tokenizer
        self._starts = array("q", accumulate(map(len, self._lines), initial=0))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        self._lines.seek(self._starts[index])
        try:
            document = json.loads(self._lines.readline())["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{self._lines.name}: damaged, not JSON lines: {error}; fetch or build it again") from None
        if isinstance(document, str):
            return document
        with told(f"{self._lines.name}: document {index + 1}: cannot be rendered by the tokenizer's chat template"):
            return self._tokenizer.apply_chat_template(document, tokenize=False)


def _document(which: str, row: Any, asked: TextSource) -> Any:
    """A text, or chat messages where they are asked for."""
    if not isinstance(row, dict) or asked.column not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise SourceError(f"{which} has no column '{asked.column}'; it has {found}")
    document = row[asked.column]
    holds = f"{which}: column '{asked.column}' holds"
    messages = isinstance(document, list) and all(isinstance(message, dict) for message in document) and document
    if asked.chat_template:
        if not messages or not all({"role", "content"} <= message.keys() for message in messages):
            raise SourceError(f"{holds} {document!r:.200}; chat_template needs messages with role and content")
    elif messages:
        raise SourceError(f"{holds} chat messages; `chat_template: true` has the tokenizer's chat template render them")
    elif not isinstance(document, str):
        raise SourceError(f"{holds} {document!r:.200} ({type(document).__name__}), which is no text")
    characters = document if isinstance(document, str) else json.dumps(document, ensure_ascii=False, default=str)
    if half := re.search(r"[\ud800-\udfff]", characters):
        raise SourceError(
            f"{which} holds {half[0]!r}, half of a character, which neither UTF-8 nor tokenizers can write; remove it"
        )
    return document


def _hub_rows(asked: TextSource) -> Generator[Any, None, None]:
    from datasets import load_dataset_builder

    source = asked.source
    split, files = asked.split, None
    if asked.data_files is not None:
        if asked.member is not None:
            raise SourceError(f"{source}: member = '{asked.member}' means nothing beside data_files; remove one")
        split = split or "train"
        files = {split: asked.data_files}
    if split is None:
        raise SourceError(f"{source}: needs 'split', as in split: test")
    with hub_name(source) as (name, revision):
        builder = load_dataset_builder(name, asked.member, data_files=files, revision=revision)
        # Offline, datasets takes its newest cached copy whatever the revision; the copy is named by its commit.
        if revision is not None and COMMIT.fullmatch(revision) and builder.hash != revision:
            raise SourceError(
                f"{source}: only commit {builder.hash} is in the local cache; unset HF_HUB_OFFLINE to fetch"
            )
        advise_pin(source, commit=builder.hash)
        if asked.documents is None:
            builder.download_and_prepare()
            yield from builder.as_dataset(split=split)
        else:  # streamed: not much more than these is read over the network
            yield from builder.as_streaming_dataset(split=split)


# Files


def _file_rows(asked: TextSource, downloads: Path, root: Path) -> Generator[Any, None, None]:
    with file_of(asked, downloads, root) as file, scratch_folder(downloads / ".text.partial") as scratch:
        if file.is_dir():
            raise SourceError(f"{asked.source}: a folder; a text is one file ({KNOWN})")
        path = _unpacked(file, scratch)
        check_access(path)
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise SourceError(f"{path.name}: '{suffix}' is not a text that can be read; known: {KNOWN}")
        with told(f"{path.name}: cannot be read as {suffix} in UTF-8"):
            yield from READERS[suffix](path, asked.column)


def _unpacked(file: Path, scratch: Path) -> Path:
    """The file itself, or what it packs, however often, as a file in the scratch folder."""
    most = max(SMALL, BOMB * file.stat().st_size)
    while file.suffix.lower() in (".gz", ".zip"):
        with (
            told(f"{file.name}: cannot be unpacked; it is damaged, or has a password"),
            _packed(file) as (name, packed),
            (scratch / name).open("wb") as unpacked,
        ):
            while piece := packed.read(2**20):
                unpacked.write(piece)
                if unpacked.tell() > most:
                    raise SourceError(
                        f"{file.name}: unpacks to more than {most} bytes, {BOMB} times its size or more, as no text "
                        f"does; if it is one, unpack it by hand"
                    )
        file = scratch / name
    return file


@contextmanager
def _packed(file: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of what a file packs."""
    if file.suffix.lower() == ".gz":
        with gzip.open(file) as packed:
            yield file.stem, packed
        return
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in READERS]
        if len(names) != 1:
            raise SourceError(f"{file.name}: should hold one file of {KNOWN}; holds {archive.namelist()}")
        with archive.open(names[0]) as packed:
            yield PurePosixPath(names[0]).name, packed


def _csv(path: Path, column: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        for row in rows:
            if None in row:
                line = f"{path.name}: line {rows.line_num}"
                raise SourceError(f"{line} has more fields than the header; put quotes around text with commas")
            yield row


def _json(path: Path, column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as stream:
        while (first := stream.read(1)).isspace():
            pass
        if first == "[":
            yield from _elements(stream)
            return
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}; a file has one object per line, or is one array") from None


def _elements(stream: TextIO) -> Iterator[Any]:
    """The elements of a JSON array, behind its bracket, each as soon as it is read."""
    held, decode = "", json.JSONDecoder().raw_decode
    while piece := stream.read(max(2**20, len(held))):
        held, at = held + piece, 0
        while True:
            try:
                element, at = decode(held, GAP.match(held, at).end())  # type: ignore[union-attr]
            except json.JSONDecodeError:
                break  # the next piece has the rest
            yield element
        held = held[at:]
    if held.strip() != "]":
        raise ValueError(f"the array has no end: {held[:50]!r}")


def _parquet(path: Path, column: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _paragraphs(path: Path, column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as stream:
        lines = (line.removesuffix("\n") for line in stream)
        for blank, paragraph in groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield {column: "\n".join(paragraph)}


READERS = {".csv": _csv, ".jsonl": _json, ".json": _json, ".parquet": _parquet, ".txt": _paragraphs}
KNOWN = ", ".join(READERS) + ", .gz, .zip"
