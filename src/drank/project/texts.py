"""Fetching a text: from its source to JSON lines, one document at a time, so that memory holds one.

Files are ``.csv``, ``.jsonl``, ``.json`` (lines, too) and ``.parquet`` with a column of text, ``.txt`` with blank lines
between documents, any of them with ``.gz``, or a ``.zip`` that holds one of these.
"""

import csv
import gzip
import json
import logging
import re
import sys
import zipfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from drank.project.files import replacing_file, scratch_folder
from drank.project.params import TextSource
from drank.project.sources import COMMIT, SourceError, advise_pin, file_of, hub_name, scheme_of, told

log = logging.getLogger(__name__)

BOMB = 200  # times its packed size: texts unpack to 3 to 20 times, zeros to 1032 times in gzip and without end in bzip2
SMALL = 2**26  # bytes that anything may unpack to


def fetch_text(asked: TextSource, destination: Path, downloads: Path, root: Path = Path()) -> None:
    """Write a text as JSON lines ``{"text": ...}``, one document a line, in its order, exactly as received.

    Arguments:
        destination: the ``.jsonl`` file to write; left alone when anything fails.
        downloads, root: as in ``file_of``.

    Raises:
        SourceError: the source cannot be had, lacks the member, column or split, holds no text, or fewer documents
            than asked.
    """
    source = asked.source
    n_documents = n_characters = 0
    blank = True
    rows = _hub_rows(asked) if scheme_of(asked) == "hub" else _file_rows(asked, downloads, root)
    # ASCII with JSON's escapes: a document is one line also to readers that split lines at U+0085 or U+2028.
    with replacing_file(destination) as partial, partial.open("w", encoding="ascii") as lines, closing(rows):
        for row in islice(rows, asked.documents):
            n_documents += 1
            document = _document(f"{source}: document {n_documents}", row, asked.column)
            n_characters += len(document)
            blank = blank and not document.strip()
            lines.write(json.dumps({"text": document}) + "\n")
        if blank:
            raise SourceError(f"{source}: holds no text ({n_documents} documents, all of them blank)")
        if n_documents < (asked.documents or 0):
            raise SourceError(
                f"{source}: holds {n_documents} documents, documents = {asked.documents} were asked; ask for fewer"
            )
    log.info("%s: %d documents, %d characters", source, n_documents, n_characters)


def _document(which: str, row: Any, column: str) -> str:
    if not isinstance(row, dict) or column not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise SourceError(f"{which} has no column '{column}'; it has {found}")
    document = row[column]
    if not isinstance(document, str):
        raise SourceError(f"{which} is no text: column '{column}' holds {document!r} ({type(document).__name__})")
    if half := re.search(r"[\ud800-\udfff]", document):
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
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise SourceError(f"{path.name}: '{suffix}' is not a text that can be read; known: {KNOWN}")
        with told(f"{path.name}: cannot be read as {suffix} in UTF-8"):
            yield from READERS[suffix](path, asked.column)


def _unpacked(file: Path, scratch: Path) -> Path:
    """The file itself, or what it packs, however often, as a file in the scratch folder."""
    most = max(SMALL, BOMB * file.stat().st_size)
    while (suffix := file.suffix.lower()) in (".gz", ".zip"):
        with told(f"{file.name}: cannot be unpacked; it is damaged, or has a password"), ExitStack() as opened:
            if suffix == ".gz":
                name = file.stem
                packed: IO[bytes] = opened.enter_context(gzip.open(file))  # type: ignore[assignment]
            else:
                archive = opened.enter_context(zipfile.ZipFile(file))
                names = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in READERS]
                if len(names) != 1:
                    raise SourceError(f"{file.name}: should hold one file of {KNOWN}; holds {archive.namelist()}")
                name = names[0]
                packed = opened.enter_context(archive.open(name))
            target = scratch / PurePosixPath(name).name
            unpacked = opened.enter_context(target.open("wb"))
            while piece := packed.read(2**20):
                unpacked.write(piece)
                if unpacked.tell() > most:
                    raise SourceError(
                        f"{file.name}: unpacks to more than {most} bytes, {BOMB} times its size or more, as no text "
                        f"does; if it is one, unpack it by hand"
                    )
        file = target
    return file


def _csv(path: Path, column: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        for row in rows:
            if None in row:
                line = f"{path.name}: line {rows.line_num}"
                raise SourceError(f"{line} has more fields than the header; put quotes around text with commas")
            yield row


def _json_lines(path: Path, column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


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


READERS = {".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet, ".txt": _paragraphs}
KNOWN = ", ".join(READERS) + ", .gz, .zip"
