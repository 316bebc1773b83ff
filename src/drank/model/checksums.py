"""A released folder carries SHA256SUMS: what is loaded of it is what was released."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

CHECKSUMS = "SHA256SUMS"
SWITCH = "DRANK_CHECKSUMS"  # "0" leaves them unread
CONFIGURATION = ("config.json", "generation_config.json", "model.safetensors.index.json")
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class ChecksumError(ValueError):
    """A file of a released folder is not the one that was released; the message names it."""


def check_released(weights: Iterable[Path]) -> None:
    """Compare weights, and the configuration beside them, with the SHA256SUMS of their folder, if it has one.

    safetensors has no checksum: a bit that flips among the numbers would load as another model. Where the hub has
    stored the files, they come without SHA256SUMS, and it has compared them itself.

    Raises:
        ChecksumError: a file has another hash, or SHA256SUMS is not what ``sha256sum`` prints.
    """
    files = list(weights)
    if os.environ.get(SWITCH) == "0":
        return
    for folder in {file.parent for file in files}:
        if not (folder / CHECKSUMS).is_file():
            continue
        listed = _read(folder / CHECKSUMS)
        for name in sorted({*CONFIGURATION, *(file.name for file in files if file.parent == folder)}):
            if name in listed and (folder / name).is_file():
                _compare(folder / name, listed[name])


def _compare(file: Path, recorded: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != recorded:
        raise ChecksumError(
            f"{file}: damaged, or changed since it was released: its sha256 is {found}, {CHECKSUMS} beside it has "
            f"{recorded}. Fetch the folder again; or, if you changed it yourself, delete {CHECKSUMS}: this is another "
            f"model now"
        )


def _read(path: Path) -> dict[str, str]:
    lines = [LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if not lines or None in lines:
        raise ChecksumError(f"{path}: damaged: a line is not a sha256, two spaces and a name; fetch the folder again")
    return {line[2]: line[1] for line in lines if line}
